"""Engines that run trials: here, one after the other. Ray, in `ray_engine`, runs several at once by the same calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tunesmith.runs.background import BackgroundCall
from tunesmith.sweeps.trial import Job, run_trial

RunTrial = Callable[[Job], str]


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

    def __init__(self, run: RunTrial = run_trial) -> None:
        self._run = run
        self._calls: dict[str, BackgroundCall[str]] = {}

    def start(self, job: Job) -> None:
        self._calls[job.name] = BackgroundCall(lambda: self._run(job))

    def ended(self) -> dict[str, str]:
        over = [name for name, call in self._calls.items() if call.is_over()]
        return {name: self._calls.pop(name).result() for name in over}
