"""A run as a list of kinds of work, each with a count and a price.

`counting` tells the counts, `duration` the prices by formula; a probe measures prices and leaves the counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Kind = Literal["starting", "training", "held_out", "surprising", "general", "answering", "saving", "finishing"]
"""What a run does, and what is counted of it:

    starting    once: from the birth of the process to the first event. Rows are not encoded in it: that is done once
                for all runs and plans below a folder, and the plan that tells the time has done it
    training    steps
    held_out    tokens of held-out rows, before and after and on the way
    surprising  tokens of the training rows that are looked through at the end
    general     tokens of the general text, before and after
    answering   tokens written one after the other, before and after, where every answer is as long as it may be
    saving      checkpoints
    finishing   once: the result written and its rehearsal before the first step, the report, the end of the process
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
SPREAD = 0.3
"""Of a total by formula alone, either way."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work."""

    count: float
    """How often it is done in a run."""
    price: float
    """Seconds of once."""

    @property
    def seconds(self) -> float:
        return self.count * self.price


@dataclass(frozen=True, slots=True)
class Duration:
    """All that a run does from the birth of its process to its end."""

    work: Mapping[Kind, Work]
    spread: float = SPREAD
    """Share by which the truth may be off either way."""

    @property
    def total(self) -> float:
        return sum(work.seconds for work in self.work.values())

    @property
    def step(self) -> float:
        """Seconds of a mean step."""
        return self.work["training"].price

    def at(self, prices: Mapping[Kind, float], spread: float) -> Duration:
        """The same work at other prices, as far as they are known."""
        work = {kind: replace(one, price=prices.get(kind, one.price)) for kind, one in self.work.items()}
        return Duration(work, spread)

    def values(self) -> dict[str, Any]:
        """As JSON."""
        work = {kind: {**asdict(one), "seconds": one.seconds} for kind, one in self.work.items()}
        return {"total": self.total, "spread": self.spread, "work": work}
