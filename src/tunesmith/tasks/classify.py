"""Classify: one class, several, or a number for a text or a pair of texts."""

from __future__ import annotations

from functools import partial

from tunesmith.tasks._heads import sequence_loss_sum, sequence_measure
from tunesmith.types import Labels, Task


def classify(labels: Labels) -> Task:
    """The task of answering with these classes, or with a number."""
    return Task(
        name="classify",
        doc="Classes of a text or of a pair of texts, or a number for it.",
        shapes=("text_label",),
        heads={"encoder": "sequence", "causal": "sequence"},
        loss_sum=partial(sequence_loss_sum, labels=labels),
        measure=partial(sequence_measure, labels=labels),
    )
