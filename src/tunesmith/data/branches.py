"""Rows with branches: one row of a file, one row in the store, a line of the model for each of its branches.

    [stem | branch | branch]  →  stem + branch, stem + branch

The stem is what all lines begin with, at most up to the first token that is trained in one of them. It is kept
once, and computed once where the lines of a micro-batch may share prefixes.
"""

# T tokens

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.types import Row


def lines_of(row: Row) -> list[Row]:
    """The lines of a row: its stem with each of its branches; a row without branches is its own line."""
    if not row.branches:
        return [row]
    stem, lines, taken = len(row.ids) - sum(row.branches), [], 0
    for start, stop in pairwise(np.cumsum([stem, *row.branches]).tolist()):
        ids_T, trained_T = (np.concatenate([of[:stem], of[start:stop]]) for of in (row.ids, row.trained))
        num = int(trained_T.sum())
        labels = None if row.labels is None else row.labels[taken : taken + num]
        lines.append(replace(row, ids=ids_T, trained=trained_T, labels=labels, branches=(), values=()))
        taken += num
    return lines


def line_tokens(row: Row) -> int:
    """Tokens of all lines of a row."""
    if not row.branches:
        return len(row.ids)
    stem = len(row.ids) - sum(row.branches)
    return len(row.ids) + (len(row.branches) - 1) * stem


def partner_line(row: Row, other: Row, max_tokens: int) -> Row:
    """The prompt of `row` with the answer of `other`, whose end is left out where it does not fit."""
    stem, start = len(row.ids) - row.branches[0], len(other.ids) - other.branches[0]
    end = start + max_tokens - stem
    ids_T = np.concatenate([row.ids[:stem], other.ids[start:end]])
    trained_T = np.concatenate([row.trained[:stem], other.trained[start:end]])
    return replace(row, ids=ids_T, trained=trained_T, branches=(), values=())


ListColumn = tuple[NDArray[Any], NDArray[Any]]
"""Offsets [I + 1] and the values between them."""


class BranchColumns:
    """The branches and values of the rows of a store."""

    def __init__(self, sizes: ListColumn, values: ListColumn, keys: ListColumn) -> None:
        self._sizes, self._values, self._keys = sizes, values, keys
        self.has_any = len(sizes[1]) > 0

    @property
    def counts(self) -> NDArray[np.int64]:
        """[I], branches of each row."""
        return np.diff(self._sizes[0]).astype(np.int64)

    @property
    def firsts(self) -> NDArray[np.float64]:
        """[I], the first number of each row, where every row has one."""
        offsets, values = self._values
        return np.asarray(values[offsets[:-1]])

    @property
    def value_counts(self) -> NDArray[np.int64]:
        """[I], numbers of each row."""
        return np.diff(self._values[0]).astype(np.int64)

    def sizes(self, row: int) -> tuple[int, ...]:
        """Tokens of each branch of a row behind its stem."""
        return _at(self._sizes, row) if self.has_any else ()

    def values(self, row: int) -> tuple[float, ...]:
        """The numbers of a row."""
        return _at(self._values, row) if self.has_any else ()

    def keys(self, row: int) -> tuple[int, ...]:
        """`Row.keys` of a row."""
        return _at(self._keys, row) if self.has_any else ()

    def padded_lengths(self, lengths_I: NDArray[np.int32]) -> NDArray[np.int32]:
        """[I], tokens of each row with its lines padded to the longest, from the tokens of all its lines."""
        offsets, sizes = self._sizes
        counts_I, starts_I = np.diff(offsets), offsets[:-1]
        stems_I = (lengths_I - np.add.reduceat(sizes, starts_I)) // counts_I
        return (counts_I * (stems_I + np.maximum.reduceat(sizes, starts_I))).astype(np.int32)


def _at(column: ListColumn, row: int) -> tuple[Any, ...]:
    offsets, values = column
    return tuple(values[offsets[row] : offsets[row + 1]].tolist())
