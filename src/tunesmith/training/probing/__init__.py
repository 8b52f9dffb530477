"""A run's heaviest moments lived through once, in a process of their own, before the run."""
