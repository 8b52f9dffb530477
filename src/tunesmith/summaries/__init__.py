"""A run, a plan and a check in words that commands and pages share: values in, text out. Imports no torch."""
