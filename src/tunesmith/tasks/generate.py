"""Generate: the completion of a prompt, as plain text without a template."""

from __future__ import annotations

from tunesmith.tasks._causal import next_token_loss_sum, next_token_measure, num_targets
from tunesmith.types import Task

GENERATE = Task(
    name="generate",
    doc="The completion of a prompt, plain text, followed by the end token.",
    shapes=("prompt_completion",),
    loss_sum=next_token_loss_sum,
    measure=next_token_measure,
    count=num_targets,
)
