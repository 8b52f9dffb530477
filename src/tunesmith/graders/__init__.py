"""Graders: a number for how good an answer is, and where it goes wrong, before anything is trained with it."""
