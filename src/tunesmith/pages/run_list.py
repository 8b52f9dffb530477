"""The list of runs: a page of the newest, and all at work, without reading the log of every run in the folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tunesmith.pages.launches import busy, starting_runs
from tunesmith.pages.live import LiveRuns
from tunesmith.runs.folder import Run
from tunesmith.serve.commands import look
from tunesmith.summaries.runs import UNREADABLE, facts, phase, time_left, unreadable
from tunesmith.types import REWARD_KEY, JsonObject

PAGE = 50
MOST_FACTS = 5_000
"""Rows that stay in memory, some kB each."""
LOOK_S = 5.0
"""Seconds between two looks at the locks of runs that were not at work; new runs are looked at at once."""
MOST_RESULTS = 1000
"""Newest runs that can be chosen to chat with, or to start from."""


class RunList:
    """The runs of a folder, newest first."""

    def __init__(self, runs: LiveRuns) -> None:
        self._runs = runs
        self._created: dict[str, float] = {}
        self._facts: dict[str, tuple[object, JsonObject]] = {}
        """Facts of runs that have ended, by name, with what their files were like."""
        self._locked: list[str] = []
        """Names of runs that had a lock when it was looked at, and of runs that came since."""
        self._looked = -LOOK_S
        self._lock = threading.Lock()

    def page(self, find: str = "", after: int = 0, limit: int = PAGE) -> JsonObject:
        """{runs, working, total, matching, next}: the rows from number `after` on of the runs whose names
        contain `find`, and apart from them all that are at work."""
        with self._lock:
            names = self._names()
            matching = [name for name in names if find.lower() in name.lower()]
            chosen = matching[after : after + limit]
            rows = [self._row(name) for name in chosen]
            working = [*starting_runs(self._runs.root), *self._working()]
        more = after + limit if after + limit < len(matching) else None
        return {"runs": rows, "working": working, "total": len(names), "matching": len(matching), "next": more}

    def at_work(self) -> list[str]:
        """Names of runs that are at work or about to be."""
        with self._lock:
            self._names()
            working = [row["name"] for row in self._working()]
        return list(dict.fromkeys([*busy(self._runs.root), *working]))

    def with_results(self) -> list[str]:
        """Names of runs that have a result, newest first."""
        with self._lock:
            runs = (Run(self._runs.root / name) for name in self._names()[:MOST_RESULTS])
            return [run.path.name for run in runs if run.adapter_path.exists() or run.model_path.exists()]

    def _names(self) -> list[str]:
        """Names of all run folders, newest first."""
        present: dict[str, float] = {}
        for name in _folders(self._runs.root):
            created = self._created.get(name) or self._made(name)
            if created is not None:
                present[name] = created
        if time.monotonic() - self._looked >= LOOK_S:
            self._looked = time.monotonic()
            self._locked = [name for name in present if (self._runs.root / name / "lock.json").exists()]
        else:
            self._locked += [name for name in present if name not in self._created]
        self._created = present
        return sorted(present, key=lambda name: (-present[name], name))

    def _made(self, name: str) -> float | None:
        run = self._runs.find(name)
        try:
            return None if run is None else run.created
        except UNREADABLE:
            return 0.0

    def _working(self) -> Iterator[JsonObject]:
        for name in sorted(self._locked, key=lambda name: (-self._created.get(name, 0.0), name)):
            run = Run(self._runs.root / name)
            if (run.path / "lock.json").exists() and run.is_locked():
                log = self._runs.log(run)
                series, last = log.series, log.last
                row = {**self._row(name), "time_left": "", "phase": "", "loss": None, REWARD_KEY: None}
                if "problem" not in row:
                    recent = series.steps.get(series.step)
                    row |= {"time_left": time_left(series), "phase": phase(run, last.time if last else 0.0)}
                    row |= {"loss": recent.loss, REWARD_KEY: recent.reward} if recent else {}
                    row |= {"is_stopping": run.stop_asked()}
                yield row

    def _row(self, name: str) -> JsonObject:
        """The facts of a run. Of one that is at work they are read from where its log was read to."""
        run = Run(self._runs.root / name)
        seen = tuple(look(run.path / file) for file in ("events.jsonl", "recipe.yaml", "lock.json"))
        known = self._facts.get(name)
        if known is not None and known[0] == seen and not run.is_locked():
            return known[1]
        try:
            log = self._runs.log(run)
            values = facts(run, log.series, log.recipe())
            if log.problem:
                values |= {"state": "unreadable", "problem": log.problem}
        except UNREADABLE as error:
            values = unreadable(run, error)
        values.pop("fields", None)
        if values["state"] not in ("running", "unreadable"):  # what could not be read may be readable again
            self._facts.pop(name, None)
            self._facts[name] = (seen, values)
            while len(self._facts) > MOST_FACTS:
                self._facts.pop(next(iter(self._facts)))
        return values


def _folders(root: Path) -> Iterator[str]:
    with suppress(OSError), os.scandir(root) as entries:
        yield from (entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())
