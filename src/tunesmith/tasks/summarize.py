"""Summarize: the summary of a document, asked for by a stated prompt."""

from __future__ import annotations

from tunesmith.tasks._tokens import token_loss_sum, token_measure
from tunesmith.types import Task

SUMMARIZE = Task(
    name="summarize",
    doc="The summary of a document.",
    shapes=("document_summary",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
)
