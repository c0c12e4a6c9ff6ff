"""The demo: the DPO paper's controlled-sentiment experiment with a small film-review model and its two scorers."""
