"""A process that works on a run: its setup, its progress, and its listener."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from tunesmith.runs.folder import Run
from tunesmith.training.setup import Setup
from tunesmith.types import Event, JsonObject, OnProgress, Record

OnEvent = Callable[[Event], None]


@dataclass
class Progress:
    """Counters that a checkpoint stores with the tensors."""

    step: int = 0
    tokens: int = 0
    targets: float = 0
    train_seconds: float = 0.0
    prepare_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    best: JsonObject = field(default_factory=dict)
    """{"step", "value", "loss"} of the best evaluation after the first step, by evaluation.metric."""
    without_best: int = 0
    """Evaluations since then."""
    tokens_per_pass: int | None = None
    """Reduced train.tokens_per_pass after running out of memory; None: not reduced."""
    kept: JsonObject = field(default_factory=dict)
    """{"step", "reason"} of the weights that are the result."""


@dataclass(frozen=True)
class Listener:
    """Callbacks of a run: they hear of events and progress, and may stop it.

    Examples:
        >>> listener = tunesmith.Listener(on_event=print, should_stop=lambda: enough)
    """

    on_event: OnEvent = lambda event: None
    on_progress: OnProgress = lambda what, done, total: None
    """(phase, done, total) of anything that takes seconds."""
    should_stop: Callable[[], bool] = lambda: False
    """Called after every step."""
    on_run: Callable[[Run], None] = lambda run: None
    """Called with the run once its folder exists."""


PROGRESS_S = 0.5
"""Least time between two notes of progress in one phase."""


def noted(listener: Listener, run: Run) -> Listener:
    """The listener of a run that also writes into the folder how far the run is, for other processes to
    read."""
    phase, at = "", 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal phase, at
        if what != phase or time.monotonic() - at >= PROGRESS_S:
            phase, at = what, time.monotonic()
            run.note_progress(what, done, total)
        listener.on_progress(what, done, total)

    return replace(listener, on_progress=on_progress)


@dataclass
class Session:
    """A `Setup` at work in a run folder: with the folder, the counters of a checkpoint and the callbacks, which
    `training_steps` and evaluation without a run do without."""

    setup: Setup
    run: Run
    progress: Progress
    listener: Listener

    def emit(self, kind: Any, values: Record, timing: Record | None = None) -> None:
        """Log an event with the current time and pass it to the listener."""
        self.pass_on(Event(kind, self.progress.step, time.time(), values, timing or {}))

    def pass_on(self, event: Event) -> None:
        self.run.append(event)
        self.listener.on_event(event)
