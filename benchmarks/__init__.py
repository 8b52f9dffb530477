"""Tunesmith beside other tools, on the same rows with the same settings; see README.md in this folder."""
