"""TensorBoard: event files in the folder `tensorboard` of the run. Values are rounded to float32, the only kind of
scalar that every reader of such files shows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.recipe.yaml_io import dump
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import RunReader, StepMetrics


def check(offline: bool) -> None:
    """Import the library, so that a broken one is found now."""
    from tensorboard.summary.writer import event_file_writer  # noqa: F401


class TensorBoardFiles:
    def __init__(self, run: Run, reader: RunReader) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.path / "tensorboard"
        self.place = str(folder)
        self.last_step, self._texts = _content(folder)
        self._recipe = run.recipe_path.read_text("utf-8")
        self._writer = EventFileWriter(str(folder))

    def log(self, steps: Sequence[StepMetrics]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for step in steps:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in step.values.items()]
            self._writer.add_event(Event(wall_time=step.time, step=step.step, summary=Summary(value=values)))
        self._writer.flush()

    def finish(self, reader: RunReader, artifacts: Mapping[str, Path]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.text.summary_v2 import text_pb

        texts = {"recipe": f"```\n{self._recipe}```", "facts": f"```\n{dump(reader.facts)}\n```"}
        if reader.state == "end":
            texts["notes"] = "\n\n".join(reader.notes)
            texts["files"] = "\n\n".join(str(path.absolute()) for path in artifacts.values())
        for tag in texts.keys() - self._texts:
            event = Event(wall_time=time.time(), step=reader.total_steps, summary=text_pb(tag, texts[tag]))
            self._writer.add_event(event)
        self._writer.close()

    def close(self) -> None:
        self._writer.close()


def _content(folder: Path) -> tuple[int, set[str]]:
    """Newest step with values in the event files of a folder, -1 without any, and the tags of their texts."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    last, texts = -1, set()
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "text":
                    texts.add(value.tag)
                else:
                    last = max(last, event.step)
    return last, texts


open_run = TensorBoardFiles
