"""The packaged experiment: a small film-review model, two judges of sentiment, and the DPO paper's controlled-sentiment
task in miniature. The scorers know no torch; `experiment` puts the rooms below together."""
