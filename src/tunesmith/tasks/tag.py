"""Tag: one class for each word of a text, such as the names in it."""

from __future__ import annotations

from functools import partial

from tunesmith.tasks._heads import word_loss_sum, word_measure
from tunesmith.types import Labels, Task


def tag(labels: Labels) -> Task:
    """The task of answering with one of these classes for each word."""
    return Task(
        name="tag",
        doc="A tag for each word, read at the word's first piece.",
        shapes=("tokens_tags",),
        heads={"encoder": "tokens", "causal": "tokens"},
        loss_sum=partial(word_loss_sum, labels=labels),
        measure=partial(word_measure, labels=labels),
    )
