"""Training: the steps of a run, its precision and its schedule. No method is known by name here."""
