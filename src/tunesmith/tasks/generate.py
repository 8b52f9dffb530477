"""Generate: the completion of a prompt, as plain text without a template."""

from __future__ import annotations

from tunesmith.tasks._tokens import token_loss_sum, token_measure
from tunesmith.types import Task

GENERATE = Task(
    name="generate",
    doc="The completion of a prompt, plain text, followed by the end token.",
    shapes=("prompt_completion",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
)
