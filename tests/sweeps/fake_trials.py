"""Trials that write the events of a run without training one."""

import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from tunesmith.runs.folder import Run
from tunesmith.sweeps.trial import Job
from tunesmith.types import Event

BASE = """
base:
  model: model
  data: {train: [chats.jsonl]}
  evaluation: {every: 10}
"""


def grid_file(folder: Path, rest: str, base: str = BASE) -> Path:
    """A file of a sweep in `folder`."""
    path = folder / "lr.yaml"
    path.write_text(base + rest, "utf-8")
    return path


def event(kind: str, step: int = 0, **values: object) -> Event:
    return Event(kind, step, time.time(), values, {})  # type: ignore[arg-type]


def measured(value: float) -> dict[str, dict[str, float]]:
    return {"loss": {"value": value, "low": value - 0.1, "high": value + 0.1}}


class FakeTrials:
    """Runs a trial by its name: an evaluation every ten steps, and a result unless it is asked to stop."""

    def __init__(
        self,
        losses: Mapping[str, Sequence[float]],
        *,
        before: Callable[[Job], str] = lambda job: "",
        waits_for_stop: Container[str] = (),
    ) -> None:
        self.losses, self.before = losses, before
        self.waits_for_stop = waits_for_stop
        """Trials that wait after an evaluation until they are asked to stop, however slow the machine is."""
        self.began: list[tuple[str, int]] = []
        """Name and the step that it began after."""
        self.heard = threading.Event()

    def __call__(self, job: Job) -> str:
        run, losses = Run(job.run), self.losses[job.name]
        if not (job.run / "run.json").exists():
            run = Run.create(job.run.parent, job.name, job.recipe.read_text("utf-8"), out=job.run)
            run.append(event("start"))
            run.append(event("plan", steps=10 * len(losses)))
        with run.lock():
            run.clear_stop()
            first = max((one.step for one in run.events() if one.kind == "step"), default=0) // 10
            self.began.append((job.name, 10 * first))
            if failure := self.before(job):
                run.append(event("failed", message=failure))
                return failure
            for i, loss in enumerate(losses[first:], start=first + 1):
                run.append(event("step", 10 * i, loss=loss))
                run.append(event("evaluation", 10 * i, name="step", measures=measured(loss)))
                deadline = time.monotonic() + (20 if job.name in self.waits_for_stop else 0.05)
                while not run.stop_asked() and time.monotonic() < deadline:
                    time.sleep(0.01)
                if run.stop_asked():
                    run.append(event("stopped", 10 * i, message="stopped"))
                    return ""
            run.append(event("evaluation", 10 * len(losses), name="after", measures=measured(losses[-1])))
            run.append(event("end", 10 * len(losses)))
        return ""
