"""What a probe found, as it travels: plain values, told piece by piece so that what ends a probe loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from tunesmith.planning.work import KINDS, Kind

T = TypeVar("T")
SETTLED = 8
"""Steps of usual size that count, the last ones: of many short ones the first are slower."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that was done."""

    seconds: float
    count: float = 1
    """How often; of a step its tokens."""
    step: int = 0
    """Which of the run; 0: none."""
    num_bytes: int = 0


@dataclass
class Found:
    """Of a probe, as far as it came."""

    steps: list[Timed] = field(default_factory=list)
    """The heaviest one, then some of usual size."""
    work: dict[Kind, Timed] = field(default_factory=dict)
    """Of each other kind of work a part, as usual as can be."""
    peak: int = 0
    """Most bytes held until now."""
    notes: list[str] = field(default_factory=list)
    ended: str = ""
    """Why it came no further; empty: it came to its end."""

    def hear(self, message: dict[str, Any]) -> None:
        """Take what the probe tells: the name of a field, or a kind of work, and its value."""
        for name, value in message.items():
            if name in ("steps", "notes"):
                getattr(self, name).append(Timed(**value) if name == "steps" else value)
            elif name in ("peak", "ended"):
                setattr(self, name, value)
            elif name in KINDS:
                self.work[name] = Timed(**value)

    def prices(self, mean_tokens: float) -> dict[Kind, float]:
        """Seconds of each kind of work that was tried, once. `mean_tokens`: of a step."""
        counted = usual(self.steps) or self.steps
        token = sum(one.seconds for one in counted) / sum(one.count for one in counted)
        return {**{kind: one.seconds / one.count for kind, one in self.work.items()}, "training": mean_tokens * token}

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def usual(steps: Sequence[T]) -> Sequence[T]:
    """Of a probe's steps those of usual size that count."""
    return steps[1:][-SETTLED:]
