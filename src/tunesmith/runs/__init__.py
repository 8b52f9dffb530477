"""A run on disk: its folder, events, checkpoints, and files that are written completely or not at all."""
