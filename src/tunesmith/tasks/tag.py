"""Tag: one class for each word of a text, such as the names in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.tasks.losses import word_loss_sum, word_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.classification import TaggingEncoder

    return TaggingEncoder(settings.tokenizer, settings.fast, settings.limit, settings.kind)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    words = text.split()
    return {"tokens": words} | ({} if answer is None else {"tags": [answer] * len(words)})


TAG = Task(
    name="tag",
    doc="A tag for each word, read at the word's first token.",
    shapes=("tokens_tags",),
    heads={"encoder": "tokens", "causal": "tokens"},
    loss_sum=word_loss_sum,
    measure=word_measure,
    encoder=_encoder,
    record=_record,
    learns_classes=True,
    by_word=True,
    detected="rows are words and their tags",
    on_overlong=("cut", "the beginning of a text shows its class; cut rows are counted"),
    headline_metrics=("span_f1", "span_recall", "tag_accuracy"),
    next_commands=(("predict", "FILE"), ("show",)),
)
