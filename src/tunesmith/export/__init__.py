"""Export of a run for other programs: files by target, a check against the tuned model, and a model card."""
