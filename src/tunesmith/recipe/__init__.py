"""The recipe: every option of a run (options), read from files and dotted settings (read), printed with docs (show)."""
