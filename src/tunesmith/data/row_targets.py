"""Targets of encoded rows besides their tokens: labels, masks, partners, references.

This is the one place that writes into a `RowStore`, and it does so before training: `write_targets` once rows
are encoded and options are decided, `write_reference` once the model of step 1 has read them, `write_teacher`
once a teacher has. Others only read.
"""

# I rows, K branches

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.teacher_rows import TeacherRows
from tunesmith.types import Labels

if TYPE_CHECKING:
    from tunesmith.data.dataset import RowStore


@dataclass(frozen=True, slots=True)
class RowTargets:
    """Targets of the rows of a store, besides their tokens."""

    labels: Labels | None = None
    """The classes or numbers of a head; None: rows hold the store's own ids of their labels."""
    masked: float | None = None
    """Share of a row's trained tokens that is learnt under a mask, at least one; see `collate.Masking`."""
    partners_I: NDArray[np.int64] | None = None
    """For each row another one, whose answer is read behind this row's prompt, though it is none; -1: none."""
    partner_tokens: int = 0
    """Most tokens of a prompt and its partner's answer."""
    reference_IK: NDArray[np.float64] | None = None
    """The log-probability of each branch's trained tokens under the model of step 1, then of the partner's."""
    teacher: TeacherRows | None = None
    """Tokens that a teacher finds likely at each target."""


def write_targets(
    sides: Sequence[tuple[RowStore, NDArray[np.int64]]],
    *,
    labels: Labels | None = None,
    masked: float | None = None,
    partner_tokens: int | None = None,
) -> None:
    """Write what is learnt into the store of each side: (store, rows that are used). `partner_tokens` None:
    rows need no partners."""
    for store in dict.fromkeys(store for store, _ in sides):
        targets = RowTargets(labels, masked)
        if partner_tokens is not None:
            parts = [rows_I for other, rows_I in sides if other is store]
            targets = RowTargets(labels, masked, partners_of(parts, store.hashes, store.inputs), partner_tokens)
        store.learn(targets)


def write_reference(store: RowStore, rows_I: NDArray[np.int64], values_IK: NDArray[np.float64]) -> None:
    """Write the reference of these rows, in their order. Other rows keep theirs."""
    before_IK = store.learnt.reference_IK
    reference_IK = np.full((len(store), values_IK.shape[1]), np.nan) if before_IK is None else before_IK.copy()
    reference_IK[rows_I] = values_IK
    store.learn(replace(store.learnt, reference_IK=reference_IK))


def write_teacher(store: RowStore, rows_I: NDArray[np.int64], values_MC: NDArray[np.float32]) -> None:
    """Write what a teacher finds likely at the targets of these rows, which come one row after another."""
    counts_I = store.targets[rows_I].astype(np.int64)
    starts_I = np.full(len(store), -1, np.int64)
    starts_I[rows_I] = np.cumsum(counts_I) - counts_I
    store.learn(replace(store.learnt, teacher=TeacherRows(values_MC, starts_I, store.targets)))


def partners_of(
    parts: Sequence[NDArray[np.int64]], hashes_I: NDArray[np.uint64], inputs_I: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """[I], the partner of each row within its part: the next row by content hash, wrapping round, that has a
    different prompt. If all prompts are equal, a row is its own partner; of a row in several parts the last one
    counts, and a row in none has -1."""
    partners_I = np.full(len(hashes_I), -1, np.int64)
    for rows_I in parts:
        order = rows_I[np.argsort(hashes_I[rows_I], kind="stable")]
        ends = np.flatnonzero(inputs_I[order] != np.roll(inputs_I[order], -1))  # before another prompt
        partners_I[order] = order
        if len(ends):
            next_end = ends[np.searchsorted(ends, np.arange(len(order))) % len(ends)]
            partners_I[order] = order[(next_end + 1) % len(order)]
    return partners_I
