"""Evaluation: held-out accuracy, win rates and KL, each with its interval."""
