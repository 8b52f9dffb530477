"""Text: documents as they are, to adapt a model to a domain."""

from __future__ import annotations

from tunesmith.tasks._tokens import token_loss_sum, token_measure
from tunesmith.types import Task

TEXT = Task(
    name="text",
    doc="Every token of plain documents; of an encoder, tokens that were masked.",
    shapes=("text",),
    heads={"causal": "next_token", "encoder": "masked_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
)
