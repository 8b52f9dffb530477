"""One process at work on one run: what it holds, what it has done, and who hears of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.runs.folder import Run
from tunesmith.training.resolve import OnProgress
from tunesmith.training.setup import Setup
from tunesmith.types import Event

OnEvent = Callable[[Event], None]


@dataclass
class Progress:
    """What a run carries from checkpoint to checkpoint beside the tensors."""

    step: int = 0
    tokens: int = 0
    targets: float = 0
    train_seconds: float = 0.0
    prepare_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    """{"step", "value"} of the best evaluation after the first step, by evaluation.metric."""
    without_best: int = 0
    """Evaluations since then."""
    tokens_per_pass: int | None = None
    """What memory left of train.tokens_per_pass; None: all of it."""
    kept: dict[str, Any] = field(default_factory=dict)
    """{"step", "reason"}: whose weights are the result."""


@dataclass(frozen=True)
class Listener:
    """Who is told what happens, and who may ask to stop."""

    on_event: OnEvent = lambda event: None
    on_progress: OnProgress = lambda what, done, total: None
    """Of anything that takes seconds: what, how much is done, of how much."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked after every step."""
    on_run: Callable[[Run], None] = lambda run: None
    """Told the run as soon as its folder is there."""


@dataclass
class Session:
    """A run being worked on."""

    setup: Setup
    run: Run
    progress: Progress
    listener: Listener

    def emit(self, kind: Any, values: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Log an event of now and tell the listener."""
        self.pass_on(Event(kind, self.progress.step, time.time(), values, timing or {}))

    def pass_on(self, event: Event) -> None:
        self.run.append(event)
        self.listener.on_event(event)
