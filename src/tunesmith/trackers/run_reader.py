"""A run's events as complete steps, with the names and facts that trackers get."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.recipe import yaml_io
from tunesmith.runs.folder import Run
from tunesmith.types import REWARD_KEY, Event, JsonObject, Record

STEP = {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm", "tokens": "tokens"} | {
    key: key for key in (REWARD_KEY, "spread", "ended", "answer_tokens", "surprise", "mismatch", "kl")
}
TIMING = ("seconds", "tokens_per_second", "peak_bytes")
MEASURED = {"evaluation": "eval", "answers": "answers", "general": "general"}
ENDS = {"value": "", "low": "_low", "high": "_high"}


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Everything that a run measured at one step."""

    step: int
    time: float
    """Seconds since the epoch of its first event."""
    values: dict[str, float] = field(default_factory=dict)


def plainly_named(tree: Record) -> JsonObject:
    """The values of a mapping by names that every tracker allows; names that differ stay different."""
    renamed: JsonObject = {}
    for name, value in tree.items():
        plain = re.sub(r"[^\w.\- ]|^\.+$", "_", name)[-200:]
        while plain in renamed:
            plain += "_"
        renamed[plain] = value
    return renamed


def metrics_of(event: Event) -> dict[str, float]:
    """Values of an event by names that trackers group at the slash: train/loss, eval/loss, eval/loss_low. Those
    of the tuned model are there as result/eval/loss too."""
    values = event.values
    if event.kind == "step":
        metrics = {f"train/{name}": values[key] for key, name in STEP.items() if key in values}
        return metrics | {f"train/{key}": event.timing[key] for key in TIMING if key in event.timing}
    if event.kind not in MEASURED:
        return {}
    measures = dict(values.get("measures", {}))
    if event.kind == "general":
        measures["loss"] = {"value": values["loss"]}
    for source, of_source in plainly_named(values.get("sources", {})).items():
        measures[f"{source}/loss"] = of_source["loss"]
    metrics = {
        f"{MEASURED[event.kind]}/{name}{end}": float(measure[key])
        for name, measure in measures.items()
        for key, end in ENDS.items()
        if measure.get(key) is not None
    }
    return metrics | (
        {f"result/{name}": value for name, value in metrics.items()} if values.get("name") == "after" else {}
    )


class RunReader:
    """Turns events into complete steps, each once, and keeps the facts of the run as they are now."""

    def __init__(self, run: Run) -> None:
        created = hashlib.sha256(repr(run.created).encode()).hexdigest()[:8]
        self.name = run.path.resolve().name
        self.key = f"{re.sub(r'[^A-Za-z0-9_-]', '-', self.name)[:40]}-{created}"
        """Name of the run for a tracker, the same wherever its folder is."""
        self.recipe: JsonObject = yaml_io.parse(run.recipe_path.read_text("utf-8"), str(run.recipe_path)) or {}
        self.facts: dict[str, JsonObject] = {}
        """Versions, and SHA-256 of the data files."""
        self.notes: list[str] = []
        self.state = ""
        """Kind of the last "end", "stopped" or "failed" event; empty: none yet, or the run continues."""
        self.newest = -1
        """Newest step that was given out."""
        self._open: dict[int, StepMetrics] = {}

    def add(self, event: Event) -> list[StepMetrics]:
        """Take the next event; return the steps that it completes: a later step came, or the run ended.

        The newest step of a run that was killed waits, as its evaluation may be missing, until that continues.
        """
        kind, values = event.kind, event.values
        if kind == "start":
            hashes = {key[5:]: digest for key, digest in values["identity"].items() if key.startswith("data ")}
            self.facts = {"versions": dict(values["versions"]), "data": hashes}
        elif kind in ("plan", "note"):
            texts = values.get("warnings", ()) if kind == "plan" else [values["text"]]
            self.notes += [text for text in texts if text not in self.notes]
        elif kind in ("end", "stopped", "failed", "resume"):
            self.state = "" if kind == "resume" else kind
        metrics = metrics_of(event) if event.step > self.newest else {}  # a resumed run repeats steps
        if metrics:  # the last step may be measured as "step" and as "after"
            step_metrics = self._open.setdefault(event.step, StepMetrics(event.step, event.time))
            step_metrics.values.update(metrics | step_metrics.values)
        until = float("inf") if self.state in ("end", "stopped") else event.step
        done = [self._open.pop(step) for step in sorted(self._open) if step < until]
        self.newest = max([self.newest, *(step_metrics.step for step_metrics in done)])
        return done


def results_of(run: Run) -> list[Path]:
    """Files and folders of a finished run that trackers get: its report, and its adapter if it has one."""
    names = ("report.html", "report.md", "report.json", "adapter")
    return [run.path / name for name in names if (run.path / name).exists()]
