"""Classify: one class, several, or a number for a text or a pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.tasks.losses import sequence_loss_sum, sequence_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.classification import ClassificationEncoder

    return ClassificationEncoder(settings.tokenizer, settings.fast, settings.limit, settings.kind)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    return {"text": text} | ({} if answer is None else {"label": answer})


CLASSIFY = Task(
    name="classify",
    doc="Classes of a text or of a pair of texts, or a number for it.",
    shapes=("text_label",),
    heads={"encoder": "sequence", "causal": "sequence"},
    loss_sum=sequence_loss_sum,
    measure=sequence_measure,
    encoder=_encoder,
    record=_record,
    learns_classes=True,
    takes_pairs=True,
    detected="rows are texts and their labels",
    on_overlong=("cut", "the beginning of a text shows its class; cut rows are counted"),
    headline_metrics=("accuracy", "macro_f1", "micro_f1", "exact_rows", "spearman", "mse", "calibration_error"),
    next_commands=(("predict", "FILE"), ("show",)),
)
