"""Summarize: the summary of a document, requested by a stated prompt."""

from __future__ import annotations

from typing import Any

from tunesmith.tasks.losses import token_loss_sum, token_measure
from tunesmith.types import Task


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    return {"document": text} | ({} if answer is None else {"summary": answer})


SUMMARIZE = Task(
    name="summarize",
    doc="The summary of a document.",
    shapes=("document_summary",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
    record=_record,
    has_prompt=True,
    writes_answers=True,
    input_role="document",
    answer_key="summary",
    detected="rows are documents and their summaries",
    on_overlong=("cut", "the end of a document is cut, never its summary; cut rows are counted"),
    headline_metrics=("rougeL", "rouge1", "perplexity"),
)
