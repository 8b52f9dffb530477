"""Rows with branches: one row of a file, one row in the store, a line of the model for each of its branches.

    [stem | branch | branch]  →  stem + branch, stem + branch

The stem is what all lines begin with, at most up to the first token that is trained in one of them. It is kept
once, and computed once where the lines of a micro-batch may share prefixes.
"""

# T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft
from tunesmith.types import LEAST_PREFIX, Row


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
    return len(row.ids) + (len(row.branches) - 1) * (len(row.ids) - sum(row.branches)) if row.branches else len(row.ids)


def join(drafts: Sequence[Draft], values: tuple[float, ...]) -> Draft:
    """The drafts of several lines as one, with what they begin with kept once.

    A stem too short to be computed apart stays in each line.
    """
    stem = min(int(np.append(draft.trained_T, True).argmax()) for draft in drafts)
    first = drafts[0].ids_T
    for other in drafts[1:]:
        shorter = min(stem, len(first), len(other.ids_T))
        stem = int(np.append(first[:shorter] != other.ids_T[:shorter], True).argmax())
    if stem < LEAST_PREFIX and len(drafts) > 1:
        stem = 0
    classes = [draft.classes_N for draft in drafts if draft.classes_N is not None]
    return Draft(
        np.concatenate([first[:stem], *(draft.ids_T[stem:] for draft in drafts)]),
        np.concatenate([drafts[0].trained_T[:stem], *(draft.trained_T[stem:] for draft in drafts)]),
        warnings=[warning for draft in drafts for warning in draft.warnings],
        classes_N=tuple(name for of_draft in classes for name in of_draft) if classes else None,
        second=drafts[0].second,
        branches=tuple(len(draft.ids_T) - stem for draft in drafts),
        values=values,
        keys=tuple(key for draft in drafts for key in draft.keys),
    )


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
