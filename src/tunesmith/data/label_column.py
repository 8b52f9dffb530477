"""The classes of a store's rows: as ids of its own vocabulary, and as what a model learns."""

# I rows, N targets, V words of the vocabulary

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.labels import targets
from tunesmith.types import IGNORE, Labels


class LabelColumn:
    """The column `labels` of record batches, memory-mapped. A row without an answer holds `IGNORE`."""

    def __init__(self, batches: Sequence[Any], vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self._offsets = [batch.column("labels").offsets.to_numpy() for batch in batches]
        self._ids = [batch.column("labels").values.to_numpy() for batch in batches]

    def at(self, batch: int, place: int) -> NDArray[np.int64]:
        """Ids of one row, in the order of its targets."""
        start, end = self._offsets[batch][place : place + 2]
        ids_N: NDArray[np.int64] = self._ids[batch][start:end]
        return ids_N

    def firsts(self) -> NDArray[np.int64]:
        """[I], the first id of each row; -1: it has none."""
        return np.concatenate(
            [
                np.empty(0, np.int64),
                *(
                    np.where(np.diff(offsets) > 0, np.maximum(np.append(ids, -1)[offsets[:-1]], -1), -1)
                    for offsets, ids in zip(self._offsets, self._ids, strict=True)
                ),
            ]
        )

    def counts(self, times_I: NDArray[np.int64]) -> NDArray[np.int64]:
        """[V], how often each id stands in the rows, each taken so many times."""
        total_V = np.zeros(len(self.vocabulary), np.int64)
        for ids_N, rows_N in self._flat():
            is_known_N = (ids_N >= 0) & (times_I[rows_N] > 0)
            weights_N = times_I[rows_N[is_known_N]]
            found_V = np.bincount(ids_N[is_known_N], weights_N, minlength=len(total_V))
            total_V += found_V.astype(np.int64)  # whole numbers far below 2**53: nothing is rounded
        return total_V

    def first_row(self, label: int, times_I: NDArray[np.int64]) -> int:
        """The first of the rows, each taken so many times, that has an id. Raises StopIteration if none has."""
        found = (rows_N[(ids_N == label) & (times_I[rows_N] > 0)] for ids_N, rows_N in self._flat())
        return int(next(rows_N[0] for rows_N in found if len(rows_N)))

    def _flat(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The ids of each record batch, and the row that each stands in."""
        first = 0
        for offsets, ids in zip(self._offsets, self._ids, strict=True):
            num_rows = len(offsets) - 1
            yield ids[offsets[0] : offsets[-1]], np.repeat(np.arange(first, first + num_rows), np.diff(offsets))
            first += num_rows

    def targets_at(self, batch: int, place: int, labels: Labels) -> NDArray[np.generic]:
        """What is learnt of one row."""
        ids_N = self.at(batch, place)
        return ids_N if IGNORE in ids_N else targets(labels, ids_N, self.vocabulary)

    def denominators(self, labels: Labels) -> NDArray[np.float64]:
        """[I], what each row adds to the number that the loss is divided by."""
        if labels.kind == "many":
            return np.full(sum(len(offsets) - 1 for offsets in self._offsets), float(labels.num_outputs))
        weights_V = np.ones(len(self.vocabulary))
        if labels.weights_C is not None:
            classes_V = targets(replace(labels, kind="tags"), np.arange(len(self.vocabulary)), self.vocabulary)
            weights_V = labels.weights_C[classes_V.astype(np.int64)]
        sums = [np.empty(0)]
        for offsets, ids in zip(self._offsets, self._ids, strict=True):
            running = np.concatenate([[0.0], np.cumsum(np.append(weights_V, 0.0)[np.maximum(ids, -1)])])
            sums.append(np.diff(running[offsets]))
        return np.concatenate(sums)
