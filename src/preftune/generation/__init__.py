"""Generation: samples from a model, seeded."""
