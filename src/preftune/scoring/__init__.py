"""Scoring: log-probabilities of responses, their reference values, and the check that both agree at the start."""
