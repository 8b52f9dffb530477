"""The trackers: a table of them, their shared interface, and checks before anything is loaded."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunesmith.environment import install_command
from tunesmith.errors import InputError
from tunesmith.recipe import yaml_io
from tunesmith.runs.folder import Run
from tunesmith.types import Event

QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
"""Variables that switch off what these libraries would send to their makers."""
PATIENCE_S = 10.0
"""Longest wait for the first answer of a server."""


class Tracker(Protocol):
    """A run that is open in a tracker. Methods raise whatever the library raises; the caller tries again later."""

    place: str
    """Where a person finds it: an address or a folder."""
    last_step: int
    """Newest step that the tracker holds; -1: none."""

    def log(self, steps: Sequence[StepMetrics]) -> None:
        """Store values of new steps, in order."""
        ...

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        """Store facts and notes, and of a run that is done its last values and artifacts; close the run."""
        ...

    def close(self) -> None:
        """Close the run after an error, without waiting for anything."""
        ...


TRACKERS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}
"""Names, which are those of packages too, and titles."""


def load(name: str) -> Any:
    """The module of a tracker: `check(offline)`, which raises InputError, and `open_run(run, reader) -> Tracker`."""
    return importlib.import_module(f"tunesmith.trackers.{name}_run")


def check_names(names: Sequence[str]) -> list[str]:
    """The trackers of these names, each once; "none" alone means no tracker.

    Raises InputError for an unknown one, or one whose package is not installed.
    """
    chosen = [] if "none" in names else list(dict.fromkeys(names))
    for name in chosen:
        if name not in TRACKERS:
            raise InputError(f"track: {name}: there is no such tracker. One of {', '.join(TRACKERS)}, or none.")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"track: {name}: the package {name} is missing. Install it: {install_command(name)}")
    return chosen


def refuse_unreachable(address: str, way_out: str) -> None:
    """Raise InputError if no server answers at an HTTP address; any answer will do."""
    try:
        urllib.request.urlopen(address, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        raise InputError(f"{address}: no server answers: {cause}. {way_out}") from error


def refuse_offline(name: str, address: str) -> None:
    """Raise InputError: the tracker would need the network."""
    raise InputError(f"track: {name}: {address} needs the network, and --offline forbids it. Drop one of the two.")


def artifacts_of(run: Run) -> tuple[dict[str, Path], int]:
    """Files and folders of a finished run that trackers get, its report and its adapter if it has one, and their
    bytes."""
    files = [run.path / name for name in ("report.html", "report.md", "report.json")]
    found = {path.name: path for path in (*files, run.adapter_path) if path.exists()}
    inside = (file for path in found.values() for file in (path, *path.rglob("*")))
    return found, sum(file.stat().st_size for file in inside if file.is_file())


STEP = {"loss": "loss", "lr": "learning_rate", "grad_norm": "grad_norm", "tokens": "tokens"}
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
