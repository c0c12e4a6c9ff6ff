"""Runs: from data and a model to a run folder with an aligned model and the figures that say what it is worth."""
