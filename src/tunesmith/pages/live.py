"""Runs as they are now: logs that are read once and then only where they grow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.errors import RunError
from tunesmith.evaluation.series import RunSeries
from tunesmith.pages.commands import look
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.summaries.runs import UNREADABLE, ending, facts, phase, time_left, unreadable
from tunesmith.summaries.words import choice_line, plan_facts, step_line
from tunesmith.types import Event, JsonObject

MOST_KEPT = 64
"""Runs whose series stay in memory."""
MOST_POINTS = 2_000
SHOWN_ANSWERS = 3


@dataclass
class FollowedLog:
    """The log of a run, read as far as it goes."""

    run: Run
    series: RunSeries = field(default_factory=RunSeries)
    last: Event | None = None
    problem: str = ""
    """The line that is no event, if there is one."""
    _tail: Tail = field(init=False)
    _recipe: tuple[object, Recipe] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._tail = Tail(self.run.events_path)

    def read(self) -> FollowedLog:
        """Take in what was written since."""
        with self._lock:
            if self.problem:
                return self
            self.series.steps = dict(self.series.steps)  # who draws a curve at this moment goes on with the old one
            try:
                for event in self._tail.read():
                    self.series.add(event)
                    self.last = event
            except UNREADABLE as error:
                self.problem = self._line_of(error)
        return self

    def recipe(self) -> Recipe:
        """Its recipe, read again where the file is another. Raises RecipeError."""
        now = look(self.run.recipe_path)
        if self._recipe is None or self._recipe[0] != now:
            self._recipe = now, self.run.recipe()
        return self._recipe[1]

    def _line_of(self, error: Exception) -> str:
        """The words on the damaged line, with its number."""
        series = RunSeries()
        try:
            for number, event in enumerate(self.run.events(), start=1):
                try:
                    series.add(event)
                except UNREADABLE as fault:
                    kind = f"{type(fault).__name__}: {fault}"
                    return f"{self.run.events_path}:{number}: an event that lacks something ({kind})."
        except RunError as damaged:
            return str(damaged)
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
        with suppress(OSError, UnicodeError):  # a folder that may not be read, or a name that no address can hold
            name.encode()
            return Run(self.root / name) if (self.root / name / "run.json").is_file() else None
        return None

    def log(self, run: Run) -> FollowedLog:
        """The log of a run, up to date."""
        key = (run.path.name, look(run.path / "run.json"))
        with self._lock:
            log = self._logs.pop(key, None) or FollowedLog(run)
            self._logs[key] = log
            while len(self._logs) > MOST_KEPT:
                self._logs.popitem(last=False)
        return log.read()


def run_values(log: FollowedLog) -> JsonObject:
    """A run as its page shows it: what `tunesmith runs --json` prints, and what goes on."""
    run, series, last = log.run, log.series, log.last
    try:
        values = facts(run, series, log.recipe())
        values.pop("fields")
        values |= _under_way(run, series, last, values["state"])
    except UNREADABLE as error:
        values = unreadable(run, error)
    if log.problem:
        values |= {"log_problem": log.problem}
    return values


def _under_way(run: Run, series: RunSeries, last: Event | None, state: str) -> JsonObject:
    if state == "unreadable":
        return {}
    code, why = ending(series, last, state)
    plan, is_running = series.plan, state == "running"
    kept_step = series.report.get("kept", {}).get("step")
    return {
        "now": step_line(series, is_at_work=False) if series.step in series.steps else "",
        "phase": phase(run, last.time if last else 0.0) if is_running else "",
        "time_left": time_left(series) if is_running else "",
        "is_stopping": is_running and run.stop_asked(),
        "ended_by": {"code": code, "message": why},
        "curve": [[step, values["loss"]] for step, values in series.course(kept_step)],
        "plan": plan_facts(plan) if plan.get("rows") else [],
        "choices": [choice_line(choice) for choice in plan.get("choices", ())],
        "notes": list(dict.fromkeys([*plan.get("warnings", ()), *series.notes])),
        "details": list(dict.fromkeys(series.details)),
        "samples": [series.samples[index] for index in islice(sorted(series.samples), SHOWN_ANSWERS)],
        "has_report": run.report_path.is_file(),
        "last_time": last.time if last else None,
        "peak_bytes": series.peak_bytes,
    }


def curve_values(series: RunSeries, points: int = MOST_POINTS, first: int = 0, last: int | None = None) -> JsonObject:
    """The training loss from step `first` to `last` in at most `points` buckets of lowest, highest and mean, by the
    last step of each; and the held-out losses, all of them."""
    end = series.step if last is None else last
    steps = [step for number, step in series.steps.items() if first <= number <= end]
    width = max(1, -(-len(steps) // max(1, points)))
    buckets = [steps[start : start + width] for start in range(0, len(steps), width)]
    columns: dict[str, list[Any]] = {"step": [], "mean": [], "low": [], "high": []}
    for bucket in buckets:
        losses = [step.loss for step in bucket]
        columns["step"].append(bucket[-1].step)
        columns["mean"].append(_finite(sum(losses) / len(losses)))
        columns["low"].append(_finite(min(losses)))
        columns["high"].append(_finite(max(losses)))
    kept_step = series.report.get("kept", {}).get("step")
    held_out = [[step, _finite(values["loss"])] for step, values in series.course(kept_step)]
    return {"steps": series.total_steps, "width": width, "training": columns, "held_out": held_out, "kept": kept_step}


def _finite(value: Any) -> float | None:
    """The number, or None for what JSON and a curve have no place for."""
    with suppress(TypeError, ValueError):
        return float(value) if abs(float(value)) < 1e300 else None
    return None
