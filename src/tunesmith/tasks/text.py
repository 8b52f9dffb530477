"""Text: plain documents, to adapt a model to a domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.tasks.losses import token_loss_sum, token_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.documents import DocumentEncoder, MaskedDocumentEncoder

    return (MaskedDocumentEncoder if settings.kind == "encoder" else DocumentEncoder)(
        settings.tokenizer, settings.fast, settings.limit, settings.stride
    )


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    return {"text": text if answer is None else f"{text} {answer}"}


TEXT = Task(
    name="text",
    doc="Every token of plain documents; for an encoder, masked tokens.",
    shapes=("text",),
    heads={"causal": "next_token", "encoder": "masked_token"},
    loss_sum=token_loss_sum,
    measure=token_measure,
    encoder=_encoder,
    record=_record,
    raw_text=True,
    answer_key="continuation",
    detected="rows are plain text, learnt as it is",
    headline_metrics=("perplexity", "bits_per_byte", "token_accuracy"),
)
