"""Summarize: the summary of a document, requested by a stated prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.tasks.losses import token_loss_sum, token_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.completion import Seq2SeqEncoder
    from tunesmith.data.summarization import SummarizationEncoder, summary_prompt

    prompt = summary_prompt(settings.prompt, settings.kind)
    if settings.kind == "encoder_decoder":
        return Seq2SeqEncoder(settings.tokenizer, settings.fast, settings.limit, prompt)
    return SummarizationEncoder(settings.tokenizer, settings.fast, settings.limit, prompt, settings.date)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    return {"document": text} | ({} if answer is None else {"summary": answer})


SUMMARIZE = Task(
    name="summarize",
    doc="The summary of a document.",
    shapes=("document_summary",),
    heads={"causal": "next_token", "encoder_decoder": "next_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
    encoder=_encoder,
    record=_record,
    has_prompt=True,
    writes_answers=True,
    input_role="document",
    answer_key="summary",
    detected="rows are documents and their summaries",
    on_overlong=("cut", "the end of a document is cut, never its summary; cut rows are counted"),
    headline_metrics=("rougeL", "rouge1", "perplexity"),
)
