"""Runs as they are now: logs that are read once and then only where they grow."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import RunError
from tunesmith.evaluation.series import RunSeries
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.serve.commands import drop_oldest, look
from tunesmith.summaries.live import under_way
from tunesmith.summaries.runs import UNREADABLE, facts, unreadable
from tunesmith.types import Event, JsonObject

MOST_KEPT, MOST_BYTES = 64, 2**28
"""Runs whose series stay in memory, and bytes of their logs."""
LIVE_S = (2.0, 10.0)
LIVE_AGE = 20
"""A page of a run at work is drawn again after a twentieth of the run's age, within these seconds."""


@dataclass
class FollowedLog:
    """The log of a run, read as far as it goes."""

    run: Run
    series: RunSeries = field(default_factory=RunSeries)
    last: Event | None = None
    problem: str = ""
    """The line that is no event, or why the log cannot be read at this moment."""
    is_damaged: bool = False
    """A line is no event: nothing after it is read."""
    _tail: Tail = field(init=False)
    _recipe: tuple[object, Recipe] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._tail = Tail(self.run.events_path)

    def read(self) -> FollowedLog:
        """Take in what was written since."""
        with self._lock:
            if self.is_damaged:
                return self
            self.problem = ""
            self.series.steps = dict(self.series.steps)  # who draws a curve now keeps the old one
            try:
                for event in self._tail.read():
                    self.series.add(event)
                    self.last = event
            except OSError as error:  # which may have passed when it is read again
                self.problem = f"{self.run.events_path}: cannot be read now: {error.strerror}."
            except UNREADABLE as error:
                self.problem, self.is_damaged = self._line_of(error), True
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes of the log that were read: about what its series takes."""
        return self._tail.offset

    def recipe(self) -> Recipe:
        """Its recipe, read again where the file is another. Raises RecipeError."""
        now = look(self.run.recipe_path)
        if self._recipe is None or self._recipe[0] != now:
            self._recipe = now, self.run.recipe()
        return self._recipe[1]

    def _line_of(self, error: Exception) -> str:
        """The words on the damaged line, with its number."""
        series, number = RunSeries(), 0
        try:
            for event in self.run.events():
                number += 1
                series.add(event)
        except RunError as damaged:
            return str(damaged)
        except UNREADABLE as fault:
            kind = f"{type(fault).__name__}: {fault}"
            return f"{self.run.events_path}:{number}: an event that lacks something ({kind})."
        return str(error)


class LiveRuns:
    """The runs of a folder, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._logs: OrderedDict[tuple[str, object], FollowedLog] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, name: str) -> Run | None:
        """The run of that name; None: there is none. A name leads nowhere but into the folder of runs."""
        if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
            return None
        with suppress(OSError, UnicodeError):  # no right to read it, or a name that no address can hold
            name.encode()
            return Run(self.root / name) if (self.root / name / "run.json").is_file() else None
        return None

    def log(self, run: Run) -> FollowedLog:
        """The log of a run, up to date."""
        key = (run.path.name, look(run.path / "run.json"))
        with self._lock:
            log = self._logs.pop(key, None) or FollowedLog(run)
            self._logs[key] = log
            drop_oldest(self._logs, MOST_KEPT, MOST_BYTES)
        return log.read()


def live_s(created: float) -> float:
    """Seconds after which a page of a run at work is drawn again. A page must not slow its run, and people watch
    the young ones. `created`: when the run began, in seconds of the epoch."""
    shortest, longest = LIVE_S
    return min(longest, max(shortest, (time.time() - created) / LIVE_AGE))


def run_values(log: FollowedLog) -> JsonObject:
    """A run as its page shows it: what `tunesmith runs --json` prints, and what goes on."""
    run, series, last = log.run, log.series, log.last
    try:
        values = facts(run, series, log.recipe())
        values.pop("fields")
        values |= under_way(run, series, last, values["state"])
    except UNREADABLE as error:
        values = unreadable(run, error)
    if log.problem:
        values |= {"log_problem": log.problem}
    return values
