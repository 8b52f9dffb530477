"""Trackio: a run by its name, in the local store, on a server of one's own, or in a Space."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics

WAY_OUT = "Without TRACKIO_SERVER_URL and TRACKIO_SPACE_ID the run stays on this machine."


def server() -> str:
    return os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or ""


def check() -> None:
    import trackio  # noqa: F401
    from huggingface_hub import get_token

    if os.environ.get("TRACKIO_SPACE_ID") and get_token() is None:
        raise InputError(f"{server()}: there is no login for it. Set HF_TOKEN, or call `hf auth login`")


class TrackioRun:
    def __init__(self, run: Run, reader: RunReader) -> None:
        import trackio
        from trackio.utils import TRACKIO_DIR

        project, config = os.environ.get("TRACKIO_PROJECT", "tunesmith"), {**reader.recipe, **reader.facts}
        how: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self._markdown = trackio.Markdown
        self._run: Any = trackio.init(project=project, name=reader.key, resume="allow", config=config, **how)
        self.place = f"{server() or TRACKIO_DIR}, project {project}, run {reader.key}"
        self.last_step = int(self._run._next_step) - 1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log(dict(step.values), step=step.step)

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        if reader.state == "end" and reader.notes and self._run._next_step <= reader.newest + 1:  # once
            self._run.log({"notes": self._markdown("\n\n".join(reader.notes))}, step=reader.newest + 1)
        for name, path in artifacts.items():
            self._run.log_artifact(path, name=f"{reader.key}-{name}", type="model" if path.is_dir() else "report")
        self.close()

    def close(self) -> None:
        self._run.finish()


open_run = TrackioRun
