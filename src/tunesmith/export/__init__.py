"""From a run to something others use: one file a target, a proof that it is what was tuned, and a model card."""
