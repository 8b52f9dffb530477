"""What a probe found, as it travels: plain values, told piece by piece so that what ends a probe loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
SETTLED = 8
"""Steps of usual size that count, the last ones: of many short ones the first are slower."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Something that was done once."""

    seconds: float
    tokens: int = 0
    step: int = 0
    """Which of the run; 0: none."""
    num_bytes: int = 0


@dataclass
class Found:
    """Of a probe, as far as it came."""

    starting: Timed | None = None
    """Loading the model and asking it what it can do."""
    steps: list[Timed] = field(default_factory=list)
    """The heaviest one, then some of usual size."""
    evaluation: Timed | None = None
    """One pass over held-out rows."""
    word: Timed | None = None
    """The next token of some answers."""
    save: Timed | None = None
    """A checkpoint."""
    peak: int = 0
    """Most bytes held until now."""
    notes: list[str] = field(default_factory=list)
    ended: str = ""
    """Why it came no further; empty: it came to its end."""

    def hear(self, message: dict[str, Any]) -> None:
        """Take what the probe tells: the name of a field and its value."""
        for name, value in message.items():
            if name in ("steps", "notes"):
                getattr(self, name).append(Timed(**value) if name == "steps" else value)
            elif name in ("peak", "ended"):
                setattr(self, name, value)
            elif name in ("starting", "evaluation", "word", "save"):
                setattr(self, name, Timed(**value))

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def usual(steps: Sequence[T]) -> Sequence[T]:
    """Of a probe's steps those of usual size that count."""
    return steps[1:][-SETTLED:]
