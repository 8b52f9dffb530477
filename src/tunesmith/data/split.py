"""Which rows are held out: by what they say alone."""

# I rows

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def is_held_out(content: int, share: float) -> bool:
    """Whether a row is held out: a function of the row alone, so rows that are added move no other row."""
    return content < _threshold(share)


def held_out_mask(hashes_I: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which rows are held out, by content hash; equal rows are always on one side.

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
        f"data.held_out: {share:g} of {len(hashes_I):,} rows is {'none' if num_held == 0 else 'all'} by content hash: "
        f"{int(mask_I.sum()):,} held out instead"
    )


def stratified_mask(hashes_I: NDArray[np.uint64], classes_I: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Which rows are held out so that every class gives its share: those of it with the smallest content hashes.

    Of n rows of a class round(share * n), at least one where n is 2 or more, never all. Equal rows are on one side.
    """
    mask_I = np.zeros(len(hashes_I), np.bool_)
    if share == 0:
        return mask_I
    order_I = np.lexsort((hashes_I, classes_I))
    starts = np.flatnonzero(np.diff(classes_I[order_I], prepend=classes_I[order_I][:1] - 1))
    for rows in np.split(order_I, starts[1:]):
        if len(rows) > 1:
            num = min(max(1, round(share * len(rows))), len(rows) - 1)
            is_held = hashes_I[rows] <= hashes_I[rows[num - 1]]
            mask_I[rows] = hashes_I[rows] < hashes_I[rows[num - 1]] if is_held.all() else is_held
    return mask_I


def stratified_note(classes_I: NDArray[np.int64], mask_I: NDArray[np.bool_], share: float) -> str | None:
    """What to say of classes of which no row could be held out; None if there is none."""
    num_alone = len(np.setdiff1d(classes_I, classes_I[mask_I]))
    if share == 0 or not num_alone:
        return None
    return f"{num_alone:,} classes have no two different rows: they are trained and never measured"


def _threshold(share: float) -> int:
    return int(share * 2.0**64)  # exact: a product with a power of two
