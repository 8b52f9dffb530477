"""A run's events so far: what every display, `runs` and `show` draw from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.types import Event, has_new_head

if TYPE_CHECKING:
    from tunesmith.evaluation.bootstrap import Interval

RECENT_STEPS = 20
"""Newest steps, from which the time left is estimated."""


@dataclass
class RunHistory:
    """The state of a run after its events so far. A resumed run repeats some of them: the later event counts."""

    plan: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    started: bool = False
    last: Mapping[str, Any] = field(default_factory=dict)
    """Values of the newest step."""
    timing: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] = field(default_factory=dict)
    after: Mapping[str, Any] = field(default_factory=dict)
    measures: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """"before" and "after" → every metric of rows, answers and general text, in the order of the events."""
    held_out: dict[int, float] = field(default_factory=dict)
    """Step → held-out loss."""
    losses: dict[int, float] = field(default_factory=dict)
    """Step → training loss."""
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    peak_bytes: int = 0
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    @classmethod
    def of(cls, events: Iterable[Event]) -> RunHistory:
        history = cls()
        for event in events:
            history.update(event)
        return history

    def update(self, event: Event) -> None:
        values = event.values
        if event.kind in ("start", "resume"):
            self.started = True
            self.step = event.step
        elif event.kind == "plan":
            # A forecast does not repeat bit for bit: it depends on the memory that is free at the moment.
            self.plan = {**values, "forecast": event.timing.get("forecast")}
        elif event.kind == "evaluation" and values["name"] == "before" and self.has_new_head:
            self.held_out[event.step] = values["loss"]  # random answers are no "before"
        elif event.kind in ("evaluation", "answers", "general"):
            self.measures.setdefault(values["name"], {}).update(measures_of(event))
            if event.kind == "evaluation":
                self._add_evaluation(event)
        elif event.kind == "step":
            self._add_step(event)
        elif event.kind == "sample":
            answer = values["answer"] if values.get("stopped", True) else values["answer"].rstrip() + " …"
            sample = self.samples.setdefault(values["index"], {})
            sample |= {"prompt": values["prompt"], "reference": values["reference"], values["name"]: answer}
        elif event.kind == "end":
            self.report = values.get("report", {})

    def _add_evaluation(self, event: Event) -> None:
        # "after" may be the evaluation of an earlier step's weights, the best; the last step then has its own.
        if event.values["name"] != "after" or event.step not in self.held_out:
            self.held_out[event.step] = event.values["loss"]
        if event.values["name"] == "before":
            self.before = event.values
        elif event.values["name"] == "after":
            self.after = event.values

    def _add_step(self, event: Event) -> None:
        self.step, self.last, self.timing = event.step, event.values, event.timing
        self.losses[event.step] = event.values["loss"]
        self._seconds.append(event.timing.get("seconds", 0.0))
        self.peak_bytes = max(self.peak_bytes, event.timing.get("peak_bytes", 0))

    @property
    def has_new_head(self) -> bool:
        return has_new_head(self.plan)

    @property
    def total_steps(self) -> int:
        return int(self.plan.get("steps", 0))

    @property
    def tokens_per_second(self) -> float:
        return float(self.timing.get("tokens_per_second", 0.0))

    @property
    def seconds_left(self) -> float | None:
        """Seconds of training left, by the mean of the newest steps; None before the first."""
        if not self._seconds or not self.total_steps:
            return None
        return sum(self._seconds) / len(self._seconds) * (self.total_steps - self.step)

    @property
    def curve(self) -> list[float]:
        """Held-out losses in the order of their steps."""
        return [self.held_out[step] for step in sorted(self.held_out)]

    def smoothed(self, width: int = 24) -> list[float]:
        """Training losses as `width` means of equal parts, for a curve of few characters."""
        losses = [self.losses[step] for step in sorted(self.losses)]
        part_size = max(1, -(-len(losses) // width))
        parts = [losses[i : i + part_size] for i in range(0, len(losses), part_size)]
        return [sum(part) / len(part) for part in parts]


def measures_of(event: Event) -> dict[str, Interval]:
    """The metrics of an "evaluation", "answers" or "general" event, by their keys in METRICS."""
    if event.kind == "general":
        return {"general_loss": alone(event.values["loss"])}
    loss = {"loss": alone(event.values["loss"])} if event.kind == "evaluation" else {}
    return {**loss, **event.values.get("measures", {})}


def alone(value: float) -> Interval:
    """A value without an interval."""
    return {"value": value, "low": math.nan, "high": math.nan}
