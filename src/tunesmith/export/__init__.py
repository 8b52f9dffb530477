"""Export of a run for other programs: a file for each target, a check against the tuned model, and a model card."""
