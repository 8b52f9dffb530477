"""What one pass over held-out rows found, row by row: every measure and every line of the report follow from it."""

# I rows, C classes, N targets of a row, D documents

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import HeadName, Labels

Floats = NDArray[np.float64]
Constant = int | float | NDArray[np.bool_]
"""One answer to every row: a class or tag by its id, a number, or which classes hold."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """What a model made of some rows, in their order."""

    losses_I: Floats
    """Each row's loss, summed over its targets: nats, or squared error."""
    counts_I: Floats
    """What each row adds to the denominator of the loss."""
    num_bytes_I: NDArray[np.int64]
    """UTF-8 bytes that the row's targets spell; 0 for other tasks than text."""
    outputs: list[NDArray[np.generic]]
    """What the model answered: the likeliest token or tag of each target, int64 [N]; sequence heads: logits or the
    number, float32 [1, C]."""
    targets: list[NDArray[np.generic]]
    """What would have been right: int64 [N]; of sequence heads int64 [1], float32 [1] or float32 [1, C]."""

    def __len__(self) -> int:
        return len(self.losses_I)

    def by_document(self, hashes_I: NDArray[np.uint64]) -> Outcomes:
        """One outcome a document: those of its windows, which share its hash, added up."""
        documents_D, document_I = np.unique(hashes_I, return_inverse=True)
        windows = np.split(np.argsort(document_I, kind="stable"), np.cumsum(np.bincount(document_I))[:-1])
        losses_D, counts_D = np.zeros(len(documents_D)), np.zeros(len(documents_D))
        num_bytes_D = np.zeros(len(documents_D), np.int64)
        np.add.at(losses_D, document_I, self.losses_I)
        np.add.at(counts_D, document_I, self.counts_I)
        np.add.at(num_bytes_D, document_I, self.num_bytes_I)
        return Outcomes(
            losses_I=losses_D,
            counts_I=counts_D,
            num_bytes_I=num_bytes_D,
            outputs=[np.concatenate([self.outputs[i] for i in some]) for some in windows],
            targets=[np.concatenate([self.targets[i] for i in some]) for some in windows],
        )

    @property
    def logits_IC(self) -> Floats:
        """Of sequence heads."""
        return np.stack([output.reshape(-1) for output in self.outputs]).astype(np.float64)

    @property
    def true_I(self) -> NDArray[np.int64]:
        """The class of each row, where it has one."""
        return np.array([target.reshape(-1)[0] for target in self.targets], np.int64)

    @property
    def true_IC(self) -> NDArray[np.bool_]:
        """Which classes each row has, where it has any number."""
        return np.stack([target.reshape(-1) for target in self.targets]) > 0

    @property
    def values_I(self) -> Floats:
        """The number of each row."""
        return np.array([target.reshape(-1)[0] for target in self.targets], np.float64)

    @property
    def hits_I(self) -> NDArray[np.int64]:
        """Targets of each row that are what the model answered: of heads that answer tokens or tags."""
        return np.array([np.sum(out == to) for out, to in zip(self.outputs, self.targets, strict=True)], np.int64)

    @property
    def lengths_I(self) -> NDArray[np.int64]:
        """Targets of each row, each counted once whatever it weighs."""
        return np.array([len(target) for target in self.targets], np.int64)


def softmax(logits_IC: Floats) -> Floats:
    """Probability of each class where just one holds."""
    shifted_IC = np.exp(logits_IC - logits_IC.max(1, keepdims=True))
    return np.asarray(shifted_IC / shifted_IC.sum(1, keepdims=True), np.float64)


def sigmoid(logits: Floats) -> Floats:
    """Probability of each class where each holds or not by itself."""
    return np.asarray((1 + np.tanh(logits / 2)) / 2, np.float64)  # exp would overflow for large negative logits


def constant_words(labels: Labels, constant: Constant) -> str | float | list[str]:
    """A constant answer as a line of a row has its own: a class, a list of classes, or a number."""
    if labels.kind == "number":
        return float(constant)
    if labels.kind == "many":
        return [labels.names[i] for i in np.flatnonzero(constant)]
    return labels.names[int(constant)]


def row_facts(head: HeadName, labels: Labels | None, outcomes: Outcomes) -> Iterator[dict[str, Any]]:
    """What is kept of each row beside its source, for comparing and for the report; JSON-ready.

    loss and count, and: tokens: `correct`; classes: `label`, `predicted` and the `probability` of what was predicted
    (lists where a row has any number of classes); numbers: `value`, `predicted`; words: `tags`, `predicted`. Where the
    loss is of all the text of a document's window, also the `bytes` of that text.
    """
    told = _told(head, labels, outcomes)
    sums = (outcomes.losses_I.tolist(), outcomes.counts_I.tolist(), outcomes.num_bytes_I.tolist())
    for loss, count, num_bytes, fields in zip(*sums, told, strict=True):
        bytes_told = {"bytes": num_bytes} if num_bytes > 0 and head == "next_token" else {}
        yield {"loss": loss, "count": count, **bytes_told, **fields}


def _told(head: HeadName, labels: Labels | None, outcomes: Outcomes) -> Iterator[dict[str, Any]]:
    if head in ("next_token", "masked_token"):
        yield from ({"correct": hits} for hits in outcomes.hits_I.tolist())
        return
    assert labels is not None  # a head that answers with classes or numbers has them
    names = labels.names
    if labels.kind == "tags":
        for output, target in zip(outcomes.outputs, outcomes.targets, strict=True):
            yield {"tags": [names[i] for i in target.tolist()], "predicted": [names[i] for i in output.tolist()]}
    elif labels.kind == "number":
        for value, answered in zip(outcomes.values_I.tolist(), outcomes.logits_IC[:, 0].tolist(), strict=True):
            yield {"value": value, "predicted": answered}
    elif labels.kind == "many":
        for true_C, chances_C in zip(outcomes.true_IC, sigmoid(outcomes.logits_IC), strict=True):
            found = np.flatnonzero(chances_C > 0.5)
            yield {
                "label": [names[i] for i in np.flatnonzero(true_C)],
                "predicted": [names[i] for i in found],
                "probability": chances_C[found].tolist(),
            }
    else:
        for true, chances_C in zip(outcomes.true_I, softmax(outcomes.logits_IC), strict=True):
            best = int(chances_C.argmax())
            yield {"label": names[true], "predicted": names[best], "probability": float(chances_C[best])}
