"""One trial: an ordinary run in a process of its own, whichever engine starts it, and a reader of its events.

Engines run trials: here, one after the other; Ray, in `ray_engine`, runs several at once by the same calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from tunesmith.errors import Stopped, TunesmithError
from tunesmith.parallel.child import run_words
from tunesmith.runs.background import in_background
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """A trial as an engine runs it, here or on another machine that sees the same disk."""

    name: str
    run: Path
    recipe: Path
    folder: Path
    """Working folder, to which the recipe's relative paths belong."""
    offline: bool = False


def run_trial(job: Job) -> str:
    """Train the trial, or continue where it was stopped or killed. Returns why it failed, or "".

    A process that a killed sweep left at work is stopped first; its run continues from there.
    """
    os.chdir(job.folder)
    run = Run(job.run)
    while run.is_locked():
        run.ask_stop()
        time.sleep(POLL_S)
    words = ["train", "--recipe", str(job.recipe), "--out", str(job.run), "--runs", str(job.run.parent)]
    if (job.run / "run.json").is_file():
        if run.state() == "done":
            return ""
        words = ["resume", str(job.run)]
    # We follow its folder.
    unheard: Any = SimpleNamespace(on_event=lambda event: None, should_stop=lambda: False)
    try:
        run_words(words, offline=job.offline, listener=unheard)
    except Stopped:
        return ""
    except TunesmithError as error:
        return str(error) or type(error).__name__
    return ""


@dataclass
class Follower:
    """Reads the events of a run as they come, also if the run starts over or takes some back."""

    run: Run
    last: JsonObject = field(default_factory=dict)
    """Measures of the newest evaluation on the way, each {"value", "low", "high"}."""
    step: int = 0
    total: int = 0
    after: JsonObject = field(default_factory=dict)
    """Measures of the result."""

    def __post_init__(self) -> None:
        self._new = Tail(self.run.events_path)

    def read(self) -> list[tuple[int, JsonObject]]:
        """Evaluations on the way that are new, as (step, measures)."""
        evaluations = []
        for event in self._new.read():
            values = event.values
            if event.kind == "plan":
                self.step, self.total = 0, int(values.get("steps", 0))
            elif event.kind == "step":
                self.step = event.step
            elif event.kind == "evaluation" and values["name"] == "after":
                self.after = dict(values["measures"])
            elif event.kind == "evaluation":
                self.last = values["measures"]
                evaluations += [(event.step, values["measures"])] if values["name"] == "step" else []
        return evaluations


class TrialRunner(Protocol):
    """Starts trials and knows which have ended."""

    @property
    def slots(self) -> int:
        """Trials at once."""
        ...

    def start(self, job: Job) -> None: ...

    def ended(self) -> dict[str, str]:
        """Trials that ended since the last call: name → why it failed, or ""."""
        ...


class OneByOne:
    """Trials one after the other, each with the whole machine."""

    slots = 1

    def __init__(self, run: Callable[[Job], str] = run_trial) -> None:
        self._run = run
        self._calls: dict[str, Future[str]] = {}

    def start(self, job: Job) -> None:
        self._calls[job.name] = in_background(lambda: self._run(job))

    def ended(self) -> dict[str, str]:
        over = [name for name, call in self._calls.items() if call.done()]
        return {name: self._calls.pop(name).result() for name in over}
