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


def _threshold(share: float) -> int:
    return int(share * 2.0**64)  # exact: a product with a power of two
