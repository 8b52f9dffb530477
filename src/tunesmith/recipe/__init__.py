"""The recipe: every option of a run (options), read from files and dotted settings, printed with docs."""
