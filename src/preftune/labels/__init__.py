"""Labels: the votes of several annotators on one pair become a probability, and a word on how far people agree."""
