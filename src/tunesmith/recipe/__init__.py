"""The recipe: every knob of a run (knobs), read from files and dotted settings (read), printed with docs (show)."""
