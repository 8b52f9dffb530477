"""Tasks that learn labels by a new head: classify and tag."""

from __future__ import annotations

from typing import Any

from tunesmith.tasks.losses import sequence_loss_sum, sequence_measure, word_loss_sum, word_measure
from tunesmith.types import Task


def _tagged(text: str, answer: str | None = None) -> dict[str, Any]:
    words = text.split()
    return {"tokens": words} | ({} if answer is None else {"tags": [answer] * len(words)})


CLASSIFY = Task(
    name="classify",
    doc="Classes of a text or of a pair of texts, or a number for it.",
    shapes=("text_label",),
    heads={"encoder": "sequence", "causal": "sequence"},
    loss_sum=sequence_loss_sum,
    measure=sequence_measure,
    encoder="tunesmith.data.classification:ClassificationEncoder",
    record=lambda text, answer=None: {"text": text} | ({} if answer is None else {"label": answer}),
    learns_classes=True,
    takes_pairs=True,
    detected="rows are texts and their labels",
    on_overlong=("cut", "the beginning of a text shows its class; cut rows are counted"),
    headline_metrics=("accuracy", "macro_f1", "micro_f1", "exact_rows", "spearman", "mse", "calibration_error"),
    next_commands=(("predict", "FILE"), ("show",)),
)
TAG = Task(
    name="tag",
    doc="A tag for each word, read at the word's first token.",
    shapes=("tokens_tags",),
    heads={"encoder": "tokens", "causal": "tokens"},
    loss_sum=word_loss_sum,
    measure=word_measure,
    encoder="tunesmith.data.classification:TaggingEncoder",
    record=_tagged,
    learns_classes=True,
    by_word=True,
    detected="rows are words and their tags",
    on_overlong=("cut", "the beginning of a text shows its class; cut rows are counted"),
    headline_metrics=("span_f1", "span_recall", "tag_accuracy"),
    next_commands=(("predict", "FILE"), ("show",)),
)
