"""A run: one fine-tuning job, from its resolved recipe to its result."""
