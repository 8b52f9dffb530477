"""Which rows are held out and measured: by what they say alone."""

# I rows

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import Choice

FLOOR, PART, LEAST, MOST = 50, 0.1, 0.05, 0.2
"""By itself: a twentieth of many rows, a tenth of up to a thousand, 50 where that is a fifth or less."""
FEW = 30
"""Held-out rows below which hardly any difference can be told from chance."""


def choose_share(num_rows: int) -> Choice:
    """The share of rows that is held out where none is given: enough to measure on, and most are left to learn from."""
    share = LEAST
    if num_rows:
        share = max(LEAST, min(PART, 2 * FLOOR / num_rows), min(MOST, FLOOR / num_rows))
    share = round(share, 4)
    num = max(1, round(share * num_rows))
    of = "1 row" if num_rows == 1 else f"{num_rows:,} rows"
    reason = (
        f"about {num:,} of {of}: a fifth of a small file, {FLOOR} to {2 * FLOOR} rows of a larger one, a "
        "twentieth of a large one"
    )
    return Choice("data.held_out", share, reason)


def held_out_mask(hashes_I: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which rows are held out, by a hash of their input or content; those with an equal one are always on one side.

    As many as the share says, those with the smallest hashes: where rows with one hash would be torn, the nearest
    number that does not. One that has more than a fifth of all rows comes last. A share that is not 0 holds out at
    least one row and leaves at least one, if there are two different ones.
    """
    _, of_row_I, sizes = np.unique(hashes_I, return_inverse=True, return_counts=True)
    mask_I = np.zeros(len(hashes_I), np.bool_)
    if share == 0 or len(sizes) < 2:
        return mask_I
    order = np.lexsort((np.arange(len(sizes)), sizes > MOST * len(hashes_I)))
    held = np.cumsum(sizes[order])[:-1]
    num = 1 + int(np.argmin(np.abs(held - round(share * len(hashes_I)))))
    return np.asarray(np.isin(of_row_I, order[:num]))


def split_note(hashes_I: NDArray[np.uint64], share: float) -> str | None:
    """What to say where nothing can be held out; None if something is."""
    if share == 0 or len(np.unique(hashes_I)) != 1:
        return None
    return "nothing is held out: it takes two different rows"


def few_note(num_held: int) -> str | None:
    """What cannot be concluded from so few held-out rows; None where they are not few, or none."""
    if not 0 < num_held < FEW:
        return None
    points = min(100, round(98 / num_held**0.5))  # half of the widest 95 % interval of a share: 1.96 * sqrt(0.25 / n)
    rows = "1 held-out row is" if num_held == 1 else f"{num_held} held-out rows are"
    return (
        f"{rows} too few to tell a small change from chance: a share measured on so few is uncertain by up to "
        f"{points} points. Give more rows with --eval, or raise data.held_out"
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
        f"{int(mask_I.sum()):,} rows are held out, where data.held_out ({share:g}) asks for "
        f"{round(share * len(keys_I)):,}: {most:,} of them have the same input or document, and so stay together"
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
    if num_alone == 1:
        return "1 class has no two different texts of its own: it is trained and never measured"
    return f"{num_alone:,} classes have no two different texts of their own: they are trained and never measured"
