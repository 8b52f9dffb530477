"""Deciding what the recipe leaves to "auto", with a reason for each."""
