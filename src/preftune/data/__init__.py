"""Reading preference data: a file, a hub name, a Dataset or a list of rows becomes Groups with Marks."""
