"""ASHA: after its first evaluations, and ever rarer, a trial goes on only if it is among the best so far.

Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", arXiv 1810.05934, in the form that stops
instead of pausing: a trial that comes first to a rung goes on, so that no device waits. What is decided follows from
the evaluations alone, in the order in which they come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Asha:
    """When trials are judged."""

    factor: int = 3
    """One in so many goes on at each rung, and rungs are so many times further apart."""
    first: int = 1
    """Evaluations before the first rung."""


@dataclass
class Judge:
    """The rungs of a sweep, with what each trial measured there."""

    asha: Asha
    every: int
    """Steps between evaluations."""
    lower_is_better: bool
    rungs: dict[int, dict[str, float]] = field(default_factory=dict)
    """Step of the rung → trial → its measure, lower is better; worse than any where it is no number."""

    def is_rung(self, step: int) -> bool:
        """Whether trials are judged after this step."""
        evaluations, rest = divmod(step, self.every * self.asha.first)
        while evaluations > 1 and evaluations % self.asha.factor == 0:
            evaluations //= self.asha.factor
        return rest == 0 and evaluations == 1

    def hear(self, trial: str, step: int, value: float) -> dict[str, Any] | None:
        """Note an evaluation; {"step", "value", "rank", "of"} if the trial is to stop for it, None if it goes on.

        `rank` counts from 1 among the `of` trials that have reached the rung so far.
        """
        if not self.is_rung(step):
            return None
        worth = value if self.lower_is_better else -value
        rung = self.rungs.setdefault(step, {})
        rung[trial] = worth if math.isfinite(worth) else math.inf
        rank = 1 + sum(other < rung[trial] for other in rung.values())
        kept = max(1, len(rung) // self.asha.factor)
        if rank <= kept and rung[trial] < math.inf:
            return None
        return {"step": step, "value": value, "rank": rank, "of": len(rung)}
