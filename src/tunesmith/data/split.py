"""Which rows are held out and measured: by what they say alone."""

# I rows

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def is_held_out(content: int, share: float) -> bool:
    """Whether a row is held out: a function of the row alone, so rows that are added move no other row."""
    return content < _threshold(share)


def held_out_mask(hashes_I: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which rows are held out, by a hash of their input or content; those with an equal one are always on one side.

    A share that is not 0 holds out at least one row and leaves at least one, if there are two different ones: where
    chance leaves a side empty, the smallest hash is held out, or the largest is not. See `split_note`.
    """
    mask_I = hashes_I < np.uint64(_threshold(share))
    if share == 0 or len(hashes_I) == 0 or hashes_I.min() == hashes_I.max():
        return np.zeros(len(hashes_I), np.bool_)
    if not mask_I.any():
        return np.asarray(hashes_I == hashes_I.min())
    if mask_I.all():
        return np.asarray(hashes_I != hashes_I.max())
    return mask_I


def split_note(hashes_I: NDArray[np.uint64], share: float) -> str | None:
    """What to say when the split by share was not possible as it stands; None when it was."""
    num_held = int((hashes_I < np.uint64(_threshold(share))).sum())
    if share == 0 or 0 < num_held < len(hashes_I):
        return None
    mask_I = held_out_mask(hashes_I, share)
    if not mask_I.any():
        return "nothing is held out: it takes two different rows"
    return (
        f"data.held_out: {share:g} of {len(hashes_I):,} rows is {'none' if num_held == 0 else 'all'} by hash: "
        f"{int(mask_I.sum()):,} held out instead"
    )


def has_one_input(inputs_I: NDArray[np.uint64]) -> bool:
    """Whether all rows have the same one, such as an empty prompt: then they are split by content, not by input."""
    return len(inputs_I) > 0 and bool((inputs_I == inputs_I[0]).all())


def crowd_note(keys_I: NDArray[np.uint64], mask_I: NDArray[np.bool_], share: float) -> str | None:
    """What to say where one input or document has more of the held-out rows than data.held_out asks for."""
    most = np.unique(keys_I[mask_I], return_counts=True)[1].max(initial=0)
    if most < 2 or most <= 2 * share * len(keys_I):
        return None
    return (
        f"data.held_out: {share:g} of {len(keys_I):,} rows is asked for, {int(mask_I.sum()):,} are held out: "
        f"{most:,} of them have one input or document, and so stay together"
    )


def stratified_mask(
    inputs_I: NDArray[np.uint64], hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64], share: float
) -> NDArray[np.bool_]:
    """Which rows are held out so that every class gives its share: those of it with the smallest input hashes.

    Of n rows of a class round(share * n), at least one where n is 2 or more, never all. Rows with one input are on one
    side: an input with several classes counts for that of its row with the smallest content hash.
    """
    mask_I = np.zeros(len(inputs_I), np.bool_)
    if share == 0:
        return mask_I
    classes_I = _classes_of_inputs(inputs_I, hashes_I, classes_I)
    order_I = np.lexsort((inputs_I, classes_I))
    starts = np.flatnonzero(np.diff(classes_I[order_I], prepend=classes_I[order_I][:1] - 1))
    for rows in np.split(order_I, starts[1:]):
        if len(rows) > 1:
            num = min(max(1, round(share * len(rows))), len(rows) - 1)
            is_held = inputs_I[rows] <= inputs_I[rows[num - 1]]
            mask_I[rows] = inputs_I[rows] < inputs_I[rows[num - 1]] if is_held.all() else is_held
    return mask_I


def _classes_of_inputs(
    inputs_I: NDArray[np.uint64], hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64]
) -> NDArray[np.int64]:
    order_I = np.lexsort((hashes_I, inputs_I))
    _, firsts, of_input_I = np.unique(inputs_I[order_I], return_index=True, return_inverse=True)
    of_row_I = np.empty_like(classes_I)
    of_row_I[order_I] = classes_I[order_I[firsts]][of_input_I]
    return of_row_I


def measured(hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """`most` of some rows, each class its share of them and at least one, by ascending content hash.

    Of a class whose rows are n, those with the smallest hashes: ceil(t * n) for one t, the largest that `most` allows.
    Where there are more classes than `most`, one row of each of the first by hash.
    """
    order_I = np.lexsort((hashes_I, classes_I))
    _, starts, of_class_I, sizes = np.unique(
        classes_I[order_I], return_index=True, return_inverse=True, return_counts=True
    )
    ranks_I = (np.arange(len(order_I)) - starts[of_class_I]) / sizes[of_class_I]
    chosen = order_I[np.lexsort((hashes_I[order_I], ranks_I))[:most]]
    return chosen[np.argsort(hashes_I[chosen], kind="stable")]


def stratified_note(classes_I: NDArray[np.int64], mask_I: NDArray[np.bool_], share: float) -> str | None:
    """What to say of classes of which no row could be held out; None if there is none."""
    num_alone = len(np.setdiff1d(classes_I, classes_I[mask_I]))
    if share == 0 or not num_alone:
        return None
    return f"{num_alone:,} classes have no two different texts of their own: they are trained and never measured"


def _threshold(share: float) -> int:
    return int(share * 2.0**64)  # exact: a product with a power of two
