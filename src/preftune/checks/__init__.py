"""What is wrong with data before compute is spent: one pass over the rows, of which digests and counts are kept."""
