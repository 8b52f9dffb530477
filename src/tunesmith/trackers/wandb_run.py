"""Weights & Biases: a run of its own id, resumed by it. Offline it is one folder, written anew whenever the run is
opened, since it follows from events.jsonl, until `wandb sync` has sent it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError, RunError
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics

OFFLINE = ("offline", "dryrun")
WAY_OUT = "Set WANDB_API_KEY, call `wandb login`, or work without the network: WANDB_MODE=offline."


def server() -> str:
    import wandb

    settings = wandb.setup().settings
    if settings.mode == "disabled":
        raise InputError("WANDB_MODE=disabled: nothing would be tracked")
    return "" if settings.mode in OFFLINE else str(settings.base_url)


def check() -> None:
    import wandb

    if wandb.setup().settings.mode not in OFFLINE and not wandb.login(verify=True, timeout=1):
        raise InputError("there is no login")


class WandbRun:
    def __init__(self, run: Run, reader: RunReader) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, x_disable_stats=True, x_disable_meta=True,
            x_save_requirements=False,
        )  # fmt: skip
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "tunesmith"),
            id=reader.key,
            name=os.environ.get("WANDB_NAME", reader.name),
            resume="allow",
            config={**reader.recipe, **reader.facts},
            settings=settings,
        )
        if self._run.settings.mode in OFFLINE:
            own = Path(self._run.dir).parent
            self.place, self.last_step = str(own), _sent_before(own, run, reader.key)
        else:
            self.place = str(self._run.url)
            self.last_step = int(self._run.step) - 1 if self._run.resumed else -1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log({**step.values, "_timestamp": step.time}, step=step.step, commit=True)

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        self._run.notes = "\n".join(reader.notes)
        for name, path in artifacts.items():
            self._run.log_artifact(str(path), name=f"{reader.key}-{name}", type="model" if path.is_dir() else "report")
        self._run.finish(exit_code=0 if reader.state in ("end", "stopped") else 1)

    def close(self) -> None:
        self._run.finish(exit_code=1)


def _sent_before(own: Path, run: Run, key: str) -> int:
    """The newest step in other folders of the run once `wandb sync` has sent one; else -1, and they are removed."""
    others = [folder for folder in own.parent.glob(f"offline-run-*-{key}") if folder != own]
    if any(path for folder in others for path in folder.glob("*.synced")):
        with suppress(RunError):
            return int(run.read_json("tracking/wandb.json")["step"])
    for folder in others:
        shutil.rmtree(folder, ignore_errors=True)
    return -1


open_run = WandbRun
