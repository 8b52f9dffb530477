"""Results of single runs, and what follows from several."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.measured import Child

WARM_UP_STEPS = 10
RULE = (
    "Rule: Tunesmith is no worse than a peer where the median of its seeds is at least the lowest of the peer's seeds, "
    "for accuracy and for macro-F1."
)


@dataclass(frozen=True, slots=True)
class Timing:
    """How training went by the clock."""

    steps: int
    train_seconds: float
    """From the beginning of the first step to the end of the last, with all that happens in between."""
    examples_per_second: float
    """Rows over seconds from the end of the last warm-up step to the end of the last step."""

    @classmethod
    def of(cls, begun: float, step_ends: Sequence[float], step_rows: Sequence[int]) -> Timing:
        """Warm-up: the first ten steps, or half of them if they are fewer than twenty."""
        if not step_ends or len(step_ends) != len(step_rows):
            raise ValueError(f"{len(step_ends)} steps ended, and {len(step_rows)} had rows")
        warm = min(WARM_UP_STEPS, len(step_ends) // 2)
        since = step_ends[warm - 1] if warm else begun
        return cls(len(step_ends), step_ends[-1] - begun, sum(step_rows[warm:]) / (step_ends[-1] - since))


@dataclass(frozen=True, slots=True)
class Scores:
    """What scikit-learn says of the predicted classes."""

    accuracy: float
    macro_f1: float


@dataclass(frozen=True, slots=True)
class Result:
    """One contestant with one seed."""

    name: str
    seed: int
    child: Child
    scores: Scores | None = None
    timing: Timing | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What it chose by itself, such as the precision of the weights."""
    error: str = ""
    """Why there are no scores; empty if there are."""


def scored(labels: Sequence[str], predicted: Sequence[str]) -> Scores:
    """Accuracy, and F1 averaged over the classes that occur on either side, each counting the same."""
    from sklearn.metrics import accuracy_score, f1_score

    if len(labels) != len(predicted):
        raise ValueError(f"it predicted {len(predicted)} rows, the test file has {len(labels)}")
    return Scores(accuracy_score(labels, predicted), f1_score(labels, predicted, average="macro"))


COLUMNS: dict[str, tuple[Callable[[Result], float], str]] = {
    "accuracy": (lambda result: _scores(result).accuracy, ".3f"),
    "macro-F1": (lambda result: _scores(result).macro_f1, ".3f"),
    "examples/s": (lambda result: _timing(result).examples_per_second, ".1f"),
    "training, s": (lambda result: _timing(result).train_seconds, ".1f"),
    "whole process, s": (lambda result: result.child.wall_seconds, ".1f"),
    "peak RSS, GiB": (lambda result: result.child.peak_bytes / 2**30, ".2f"),
}
"""What a table shows of each contestant: of a result, and how it is written."""


def _scores(result: Result) -> Scores:
    assert result.scores is not None  # only results without an error are tabled
    return result.scores


def _timing(result: Result) -> Timing:
    assert result.timing is not None
    return result.timing


def verdict(ours: Sequence[Result], peers: Sequence[Result]) -> tuple[bool | None, str]:
    """Whether ours is no worse than one peer by RULE, None where it cannot be said; and a sentence that says so.

    Why this rule: it asks that a difference be larger than what another seed alone makes of the peer. It is not
    lenient: of two equal methods, ours falls below all of three seeds of the peer with two of three seeds by chance
    once in five times (3 of the 15 places that the lowest two of six can have), of five seeds once in twelve.
    """
    name = peers[0].name
    broken = [result for result in (*ours, *peers) if result.error]
    if broken:
        listed = ", ".join(f"{result.name} with seed {result.seed}" for result in broken)
        return None, f"No verdict against {name}: failed: {listed}."
    if len(ours) < 2:
        return None, f"No verdict against {name}: one seed shows no spread; give --seeds 3."
    parts, holds = [], True
    for column in ("accuracy", "macro-F1"):
        value, form = COLUMNS[column]
        median, lowest = statistics.median(map(value, ours)), min(map(value, peers))
        holds &= median >= lowest
        sign = "≥" if median >= lowest else "<"
        parts.append(f"{column} {median:{form}} {sign} {lowest:{form}}")
    how = "no worse than" if holds else "WORSE than"
    return holds, f"Tunesmith is {how} {name}: {', '.join(parts)} (our median, its lowest of {len(peers)} seeds)."
