"""Weights & Biases: a run of its own id, resumed by it; offline, one folder a process, which `wandb sync` joins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunesmith.environment import install_command
from tunesmith.errors import InputError, RunError
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics, refuse_unreachable

OFFLINE = ("offline", "dryrun")
_WAY_OUT = "Set WANDB_API_KEY, call `wandb login`, or work without the network: WANDB_MODE=offline."


def check(offline: bool) -> None:
    """Check that the login works and the server answers, unless it works offline."""
    if offline:
        os.environ["WANDB_MODE"] = "offline"
    import wandb

    if tuple(map(int, wandb.__version__.split(".")[:2])) < (0, 31):  # the first whose `leet inspect` is used
        raise InputError(f"track: wandb: {wandb.__version__} is too old. Install it: {install_command('wandb')}")
    settings = wandb.setup().settings
    if settings.mode in OFFLINE:
        return
    if settings.mode == "disabled":
        raise InputError("WANDB_MODE=disabled: nothing would be tracked. Unset it, or leave --track wandb out.")
    refuse_unreachable(settings.base_url, _WAY_OUT)
    try:
        has_login = wandb.login(verify=True, timeout=1)
    except Exception as error:  # wandb raises errors of many classes, all of them about the login here
        raise InputError(f"wandb: {settings.base_url}: the login fails: {error}. {_WAY_OUT}") from error
    if not has_login:
        raise InputError(f"wandb: {settings.base_url}: there is no login. {_WAY_OUT}")


class WandbRun:
    def __init__(self, run: Run, reader: RunReader) -> None:
        import wandb

        self._wandb = wandb
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
            every = Path(self._run.dir).parents[1] / f"offline-run-*-{reader.key}"
            self.place = str(every)  # wandb makes a folder each time; its `sync` joins them
            steps = {str(path): _last_step(path) for path in every.parent.glob(f"{every.name}/run-{reader.key}.wandb")}
            self.last_step = max([-1, *(step for step in steps.values() if step is not None)])
            if damaged := [path for path, step in steps.items() if step is None]:
                with suppress(RunError):  # the newest step when wandb last closed the run in peace
                    state = run.read_json("tracking/wandb.json")
                    self.last_step = max(self.last_step, state["kept"] if state["place"].startswith(self.place) else -1)
                self.place += f"; damaged, and not read: {', '.join(damaged)}"
        else:
            self.place = str(self._run.url)
            self.last_step = int(self._run.step) - 1 if self._run.resumed else -1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log({**step.values, "_timestamp": step.time}, step=step.step, commit=True)

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        self._run.config.update({**reader.recipe, **reader.facts}, allow_val_change=True)
        self._run.notes = "\n".join(reader.notes)
        if reader.state == "end":
            self._run.summary.update(reader.last_values)
            for name, path in artifacts.items():
                is_model = path.is_dir()
                artifact = self._wandb.Artifact(f"{reader.key}-{name}", type="model" if is_model else "report")
                (artifact.add_dir if is_model else artifact.add_file)(str(path))
                self._run.log_artifact(artifact)
        self._run.finish(exit_code=0 if reader.state in ("end", "stopped") else 1)

    def close(self) -> None:
        self._run.finish(exit_code=1)


def _last_step(path: Path) -> int | None:
    """Newest step in a .wandb file of an offline run, as wandb reads it; -1: none; None: it cannot read the file."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(path)]
    found = subprocess.run(words, capture_output=True, check=False)
    if found.returncode:
        return None
    step = json.loads(found.stdout)["step"]
    return -1 if step is None else int(step)


open_run = WandbRun
