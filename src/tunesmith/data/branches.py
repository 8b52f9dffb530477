"""Rows with branches: one row of a file, one row in the store, and a line of the model for each of its branches.

    [stem | branch | branch]  →  stem + branch, stem + branch

The stem is what all lines begin with, at most up to the first token that is trained in one of them. It is kept once,
and computed once where the lines of a micro-batch may share prefixes.
"""

# T tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.drafts import Draft
from tunesmith.types import LEAST_PREFIX, Row


def lines_of(row: Row) -> list[Row]:
    """The lines of a row: its stem with each of its branches; a row without branches is its own line."""
    if not row.branches:
        return [row]
    stem, lines = len(row.ids) - sum(row.branches), []
    start = stem
    for size in row.branches:
        ids_T, trained_T = (
            np.concatenate([whole[:stem], whole[start : start + size]]) for whole in (row.ids, row.trained)
        )
        lines.append(replace(row, ids=ids_T, trained=trained_T, branches=(), values=()))
        start += size
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
        differ = np.flatnonzero(first[:shorter] != other.ids_T[:shorter])
        stem = int(differ[0]) if len(differ) else shorter
    if stem < LEAST_PREFIX:
        stem = 0
    return Draft(
        np.concatenate([first[:stem], *(draft.ids_T[stem:] for draft in drafts)]),
        np.concatenate([drafts[0].trained_T[:stem], *(draft.trained_T[stem:] for draft in drafts)]),
        num_unspelled=sum(draft.num_unspelled for draft in drafts),
        warnings=[warning for draft in drafts for warning in draft.warnings],
        branches=tuple(len(draft.ids_T) - stem for draft in drafts),
        values=values,
    )


class BranchColumns:
    """The branches and values of the rows of a store, memory-mapped."""

    def __init__(self, batches: Sequence[Any]) -> None:
        columns = [[batch.column(name) for batch in batches] for name in ("branches", "values")]
        self._sizes, self._values = ([(one.offsets.to_numpy(), one.values.to_numpy()) for one in of] for of in columns)
        self.has_any = any(len(sizes) for _, sizes in self._sizes)
        self.reference: NDArray[np.float64] | None = None
        """[I, K], the log-probability of each branch's trained tokens under the model of step 1; None: not computed."""

    def sizes(self, batch: int, place: int) -> tuple[int, ...]:
        """Tokens of each branch of a row behind its stem, by its record batch and its place there."""
        return tuple(_at(self._sizes, batch, place)) if self.has_any else ()

    def values(self, batch: int, place: int) -> tuple[float, ...]:
        """The numbers of a row."""
        return tuple(_at(self._values, batch, place)) if self.has_any else ()

    def padded_lengths(self, lengths_I: NDArray[np.int32]) -> NDArray[np.int32]:
        """[I], tokens of each row where its lines are padded to the longest, by those of all its lines."""
        parts, first = [np.empty(0, np.int32)], 0
        for offsets, sizes in self._sizes:
            counts, starts = np.diff(offsets), offsets[:-1]
            stems = (lengths_I[first : first + len(counts)] - np.add.reduceat(sizes, starts)) // counts
            parts.append((counts * (stems + np.maximum.reduceat(sizes, starts))).astype(np.int32))
            first += len(counts)
        return np.concatenate(parts)


def _at(columns: Sequence[tuple[NDArray[Any], NDArray[Any]]], batch: int, place: int) -> list[Any]:
    offsets, values = columns[batch]
    found: list[Any] = values[offsets[place] : offsets[place + 1]].tolist()
    return found
