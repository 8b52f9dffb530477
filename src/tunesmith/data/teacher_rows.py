"""The tokens that a teacher finds likely at each target of some rows; they are written before training."""

# I rows, M targets of all rows, N targets of one, C numbers of each

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_IDS = 1 << 24
"""Largest number of token ids of which float32 holds each exactly."""


def columns(top: int) -> int:
    """Numbers of a target: `top` ids, the log-probability of each, and the one of all other tokens together."""
    return 2 * top + 1


@dataclass(frozen=True)
class TeacherRows:
    """The teacher's `top` likeliest tokens at each target of some rows of a store, with log-probabilities."""

    values_MC: NDArray[np.float32]
    """See `columns`; in a file that is mapped into memory."""
    starts_I: NDArray[np.int64]
    """Place of the first target of each row of the store; -1: the row has none."""
    targets_I: NDArray[np.int32]

    def values(self, index: int) -> NDArray[np.float32] | None:
        """[N, C], the numbers of one row."""
        start = int(self.starts_I[index])
        return None if start < 0 else np.asarray(self.values_MC[start : start + int(self.targets_I[index])])
