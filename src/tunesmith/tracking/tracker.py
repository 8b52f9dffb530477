"""The trackers: a table of them, their shared interface, and checks before anything is loaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tunesmith.environment import install_command
from tunesmith.errors import InputError
from tunesmith.runs.folder import Run
from tunesmith.tracking.step_metrics import RunReader, StepMetrics

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


@dataclass(frozen=True, slots=True)
class TrackerInfo:
    """A row of `TRACKERS`."""

    title: str
    package: str
    module: str
    """Has `check(offline) -> None`, which raises InputError, and `open_run(run, reader, kept) -> Tracker`;
    `kept` is a step that is surely stored, for trackers that cannot be asked."""

    def load(self) -> Any:
        return importlib.import_module(f"tunesmith.tracking.{self.module}")


TRACKERS = {
    "tensorboard": TrackerInfo("TensorBoard", "tensorboard", "tensorboard_files"),
    "wandb": TrackerInfo("Weights & Biases", "wandb", "wandb_run"),
    "mlflow": TrackerInfo("MLflow", "mlflow", "mlflow_run"),
    "trackio": TrackerInfo("Trackio", "trackio", "trackio_run"),
}


def check_names(names: Sequence[str]) -> list[str]:
    """The trackers of these names, each once; "none" alone means no tracker.

    Raises InputError for an unknown one, or one whose package is not installed.
    """
    chosen = [] if "none" in names else list(dict.fromkeys(names))
    for name in chosen:
        if name not in TRACKERS:
            raise InputError(f"track: {name}: there is no such tracker. One of {', '.join(TRACKERS)}, or none.")
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            way = install_command(name)
            raise InputError(f"track: {name}: the package {TRACKERS[name].package} is missing. Install it: {way}")
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


def artifacts_of(run: Run) -> dict[str, Path]:
    """Files and folders of a finished run that trackers get: its report, and its adapter if it has one."""
    files = [run.path / name for name in ("report.html", "report.md", "report.json")]
    return {path.name: path for path in (*files, run.adapter_path) if path.exists()}


def num_bytes(artifacts: Mapping[str, Path]) -> int:
    """Size of files and folders together."""
    files = (file for path in artifacts.values() for file in ([path] if path.is_file() else path.rglob("*")))
    return sum(os.path.getsize(file) for file in files if file.is_file())
