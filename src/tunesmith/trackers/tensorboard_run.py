"""TensorBoard: event files in the folder `tensorboard` of the run, written anew whenever the run is opened: they follow
from events.jsonl. Values are rounded to float32, the only kind of scalar that every reader of such files shows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.recipe.yaml_io import dump
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics

WAY_OUT = "Install the package tensorboard again."


def server() -> str:
    return ""


def check() -> None:
    from tensorboard.summary.writer import event_file_writer  # noqa: F401


class TensorBoardFiles:
    last_step = -1

    def __init__(self, run: Run, reader: RunReader) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.path / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.place = str(folder)
        self._writer = EventFileWriter(str(folder))
        self._add(0, time.time(), session_log=SessionLog(status=SessionLog.START))  # a viewer drops what it has read

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for step in steps:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in step.values.items()]
            self._add(step.step, step.time, summary=Summary(value=values))
        self._writer.flush()

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        texts = {"recipe": f"```\n{dump(reader.recipe)}```", "facts": f"```\n{dump(reader.facts)}```"}
        texts["notes"] = "\n\n".join(reader.notes)
        texts["files"] = "\n\n".join(str(path.absolute()) for path in artifacts.values())
        for tag, text in texts.items():
            self._add(max(reader.newest, 0), time.time(), summary=text_pb(tag, text))
        self.close()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, wall_time: float, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=wall_time, step=step, **content))


open_run = TensorBoardFiles
