"""Trackio: a run by its name, in the local store, on a server of one's own, or in a Space."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import InputError
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics, refuse_offline, refuse_unreachable


def check(offline: bool) -> None:
    """Check that a server answers, or a login for a Space is there, if one of them is set."""
    server, space = os.environ.get("TRACKIO_SERVER_URL"), os.environ.get("TRACKIO_SPACE_ID")
    if (server or space) and offline:
        refuse_offline("trackio", space or server or "")
    import trackio  # noqa: F401

    if space:
        from huggingface_hub import get_token

        if get_token() is None:
            raise InputError(
                f"TRACKIO_SPACE_ID={space}: there is no login for it. Set HF_TOKEN, call `hf auth login`, or unset "
                "TRACKIO_SPACE_ID to keep the run on this machine."
            )
    elif server:
        refuse_unreachable(server, "Check TRACKIO_SERVER_URL, or unset it to keep the run on this machine.")


class TrackioRun:
    def __init__(self, run: Run, reader: RunReader) -> None:
        import trackio
        from trackio.utils import TRACKIO_DIR

        self._markdown = trackio.Markdown
        project = os.environ.get("TRACKIO_PROJECT", "tunesmith")
        self._run: Any = trackio.init(
            project=project,
            name=reader.key,
            resume="allow",
            config={**reader.recipe, **reader.facts},
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        where = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or str(TRACKIO_DIR)
        self.place = f"{where}, project {project}, run {reader.key}"
        self.last_step = int(self._run._next_step) - 1

    def log(self, steps: Sequence[StepMetrics]) -> None:
        for step in steps:
            self._run.log(dict(step.values), step=step.step)

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        if reader.state == "end":
            if reader.notes and int(self._run._next_step) <= reader.total_steps + 1:  # a step of their own: once
                self._run.log({"notes": self._markdown("\n\n".join(reader.notes))}, step=reader.total_steps + 1)
            for name, path in artifacts.items():
                self._run.log_artifact(path, name=f"{reader.key}-{name}", type="model" if path.is_dir() else "report")
        self._run.finish()

    def close(self) -> None:
        self._run.finish()


open_run = TrackioRun
