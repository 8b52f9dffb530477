"""Experiment trackers as readers of a run's events, see docs/guide/tracking.md. Training never imports them."""
