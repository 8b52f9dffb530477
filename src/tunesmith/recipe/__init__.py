"""The recipe: every knob of a run (knobs), read from YAML, JSON and dotted settings (read), printed with docs (show)."""
