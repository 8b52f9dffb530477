"""The passes of a run that need the most memory, found among those that will occur."""

# I rows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.sampler import MicroBatch, StepSampler, micro_batches_of
from tunesmith.types import Layout

MOST_STEPS = 1000
"""Steps that are looked through: of longer runs that many, evenly spread, and the passes of the longest rows."""
MOST_SHARING_STEPS = 64
"""The same where rows share what they begin with, which takes longer to find and fills all passes alike."""


@dataclass(frozen=True, slots=True)
class Heavy:
    """One pass of one step."""

    step: int
    rows: MicroBatch
    accumulating: bool
    """Whether the step has other passes, so that gradients are there already."""


def heaviest(plan: StepSampler, total_steps: int, targets_I: NDArray[np.float64]) -> list[Heavy]:
    """The pass that computes most, and that of the most targets where it is another one: layers keep by the token, the
    head by the target. Where rows share what they begin with also that whose rows have most tokens, by which they keep
    keys. `targets_I`: of each row of the store."""
    found = [
        Heavy(step, rows, len(passes) > 1)
        for step in _some_steps(total_steps, MOST_STEPS if plan.ids_of is None else MOST_SHARING_STEPS)
        for passes in [plan.step(step)]
        for rows in passes
    ]

    def tokens(heavy: Heavy) -> tuple[int, int]:
        squares = sum(size * size for size in plan.lengths_of(heavy.rows))
        return plan.computed(heavy.rows), squares

    def targets(heavy: Heavy) -> float:
        return float(sum(targets_I[i] for i in heavy.rows))

    most = [max(found, key=tokens)]
    if plan.ids_of is not None:
        longest = max(found, key=lambda heavy: sum(plan.lengths_of(heavy.rows)))
        most += [longest] if longest != most[0] else []
    richest = max(found, key=targets)
    return most if any(targets(heavy) > 0.9 * targets(richest) for heavy in most) else [*most, richest]


def heaviest_looked(store: RowStore, rows: Sequence[int], *, tokens_per_pass: int, layout: Layout) -> MicroBatch:
    """Of the passes over held-out rows that of the most targets."""
    passes = micro_batches_of(store, rows, tokens_per_pass=tokens_per_pass, layout=layout)
    return max(passes, key=lambda members: float(sum(store.denominators[i] for i in members)))


def _some_steps(total: int, most: int) -> list[int]:
    if total <= most:
        return list(range(1, total + 1))
    return sorted({int(step) for step in np.linspace(1, total, most)})
