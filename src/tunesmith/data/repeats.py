"""Rows that say the same, by their hashes."""

# I rows

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def duplicates(hashes_I: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(row, the first row that is the same) of every row that repeats one, in the order of rows."""
    order_I = np.argsort(hashes_I, kind="stable")
    sorted_I = hashes_I[order_I]
    starts_I = np.ones(len(sorted_I), np.bool_)
    starts_I[1:] = sorted_I[1:] != sorted_I[:-1]
    firsts_I = order_I[np.flatnonzero(starts_I)][np.cumsum(starts_I) - 1] if len(order_I) else order_I
    again_I = np.sort(order_I[~starts_I])
    first_of_I = np.empty_like(order_I)
    first_of_I[order_I] = firsts_I
    return np.stack([again_I, first_of_I[again_I]], axis=1)


def overlap(train_I: NDArray[np.uint64], held_I: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(held-out row, the first training row that is the same), in the order of held-out rows."""
    shared_I = np.flatnonzero(np.isin(held_I, train_I))
    if not len(shared_I):
        return np.empty((0, 2), np.int64)
    values, firsts = np.unique(train_I, return_index=True)
    return np.stack([shared_I, firsts[np.searchsorted(values, held_I[shared_I])]], axis=1)


def input_overlap(is_equal_I: NDArray[np.bool_], train_I: NDArray[np.uint64], held_I: NDArray[np.uint64]) -> list[str]:
    """What to say of held-out rows whose input is also trained, with another answer.

    `is_equal_I`: the held-out rows that are trained as they are; the others are hashes of inputs.
    """
    num = int((np.isin(held_I, train_I) & ~is_equal_I).sum())
    if not num:
        return []
    return [
        f"{num:,} of {len(held_I):,} held-out rows have an input that is also trained, with another answer: "
        "their measures are not those of unseen rows"
    ]


def conflicts(texts_I: NDArray[np.uint64], rows_I: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(row, the first row with the same text) of every row that is another than that one, in the order of rows.

    `texts_I` are hashes of texts alone, `rows_I` of texts and their labels.
    """
    _, firsts, of_text_I = np.unique(texts_I, return_index=True, return_inverse=True)
    first_I = firsts[of_text_I]
    found_I = np.flatnonzero(rows_I != rows_I[first_I])
    return np.stack([found_I, first_I[found_I]], axis=1)
