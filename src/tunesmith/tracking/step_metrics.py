"""A run's events as trackers take them: one set of named values a step, and facts that hold for the whole run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.recipe import yaml_io
from tunesmith.runs.folder import Run
from tunesmith.types import Event

STEP = {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm", "penalty": "penalty", "tokens": "tokens"}
TIMING = {"seconds": "seconds", "tokens_per_second": "tokens_per_second", "peak_bytes": "peak_bytes"}
MEASURED = {"evaluation": "eval", "answers": "answers", "general": "general"}


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Everything that a run measured at one step."""

    step: int
    time: float
    """Seconds since the epoch of its first event."""
    values: dict[str, float] = field(default_factory=dict)


def metrics_of(event: Event) -> dict[str, float]:
    """Values of an event by names that trackers group at the slash: train/loss, eval/loss, eval/loss_low."""
    if event.kind == "step":
        found = {f"train/{name}": event.values[key] for key, name in STEP.items() if key in event.values}
        return found | {f"train/{name}": event.timing[key] for key, name in TIMING.items() if key in event.timing}
    if event.kind not in MEASURED:
        return {}
    prefix = MEASURED[event.kind]
    found = {f"{prefix}/loss": event.values["loss"]} if event.kind == "general" else {}
    found |= _with_intervals(prefix, event.values.get("measures", {}))
    for source, measures in event.values.get("sources", {}).items():
        loss = {"loss": measures["loss"]}
        found |= _with_intervals(f"{prefix}/{re.sub(r'[^A-Za-z0-9_.-]', '_', source)}", loss)
    return found


def _with_intervals(prefix: str, measures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    ends = (("value", ""), ("low", "_low"), ("high", "_high"))
    return {
        f"{prefix}/{name}{end}": float(measure[key])
        for name, measure in measures.items()
        for key, end in ends
        if measure.get(key) is not None
    }


class RunReader:
    """Turns events into complete steps, and keeps the facts of the run as they are now."""

    def __init__(self, run: Run) -> None:
        created = hashlib.sha256(repr(run.created).encode()).hexdigest()[:8]
        self.name = run.path.resolve().name
        self.key = f"{re.sub(r'[^A-Za-z0-9_-]', '-', self.name)[:40]}-{created}"
        """Name of the run for a tracker, the same wherever its folder lies."""
        self.recipe: dict[str, Any] = yaml_io.parse(run.recipe_path.read_text("utf-8"), str(run.recipe_path)) or {}
        self.facts: dict[str, dict[str, Any]] = {}
        """Versions, SHA-256 of the data files, and the size of the run."""
        self.notes: list[str] = []
        self.state = ""
        """Kind of the last "end", "stopped" or "failed" event; empty: none yet, or the run continues."""
        self.last_values: dict[str, float] = {}
        """Metrics of the last evaluation, by their names."""
        self.total_steps = 0
        self._open: StepMetrics | None = None

    def add(self, event: Event) -> list[StepMetrics]:
        """Take the next event; return the steps that are complete with it. An event of an earlier step means that a
        resumed run repeats some: they come again."""
        if event.kind in ("start", "plan"):
            self._remember(event)
        elif event.kind == "note":
            self.notes.append(event.values["text"])
        if event.kind in ("end", "stopped", "failed", "resume"):
            self.state = "" if event.kind == "resume" else event.kind
        values = metrics_of(event)
        if event.values.get("name") == "after":
            self.last_values |= {f"result/{name}": value for name, value in values.items()}
        done: list[StepMetrics] = []
        if values:
            if self._open is not None and event.step != self._open.step:
                done = [self._open] if event.step > self._open.step else []
                self._open = None
            if self._open is None:
                self._open = StepMetrics(event.step, event.time)
            for name, value in values.items():
                self._open.values.setdefault(name, value)  # the last step may be measured as "step" and as "after"
        return done + (self.rest() if self.state else [])

    def rest(self) -> list[StepMetrics]:
        """The newest step, if nothing more can come for it. A step that was to be evaluated, and was not before the run
        was killed or failed, waits for the run to be resumed."""
        step = self._open
        if step is None:
            return []
        every = (self.recipe.get("evaluation") or {}).get("every")
        is_due = step.step == self.total_steps or (every and step.step % every == 0)
        if self.state not in ("end", "stopped") and is_due and "eval/loss" not in step.values:
            return []
        self._open = None
        return [step]

    def _remember(self, event: Event) -> None:
        values = event.values
        if event.kind == "start":
            hashes = {key[5:]: digest for key, digest in values["identity"].items() if key.startswith("data ")}
            self.facts |= {"versions": dict(values["versions"]), "data": hashes}
            return
        self.total_steps = values["steps"]
        self.notes += [text for text in values.get("warnings", ()) if text not in self.notes]
        keys = ("model", "task", "method", "steps", "trained_parameters", "total_parameters", "device", "precision")
        sizes = {f"rows.{name}": number for name, number in values.get("rows", {}).items()}
        self.facts["run"] = {**{key: values[key] for key in keys if key in values}, **sizes}
