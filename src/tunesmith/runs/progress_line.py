"""A progress line for calls from Python: a bar in a notebook, a line on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from tunesmith.errors import RunError
from tunesmith.formatting import PHASES
from tunesmith.runs.folder import Run
from tunesmith.types import Event


def is_wanted() -> bool:
    """Whether somebody watches: in a notebook, or where stderr is a terminal."""
    in_notebook = "ipykernel" in sys.modules
    return in_notebook or bool(sys.stderr is not None and sys.stderr.isatty())


@dataclass
class ProgressLine:
    """One bar that moves on from phase to phase; `run`, `event` and `tick` are what a `Listener` takes."""

    make: Callable[..., Any] = tqdm
    _bar: Any = None
    _phase: str = ""
    _steps: int = 0
    _facts: dict[str, str] = field(default_factory=dict)

    def tick(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of a phase."""
        if what != self._phase or self._bar is None:
            self.close()
            self._phase = what
            self._bar = self.make(total=total, desc=PHASES.get(what, what), leave=False)
        if total != self._bar.total:
            self._bar.total = total
        self._bar.update(done - self._bar.n)

    def run(self, run: Run) -> None:
        """Take the number of steps from the plan of a resumed run."""
        with suppress(RunError):  # a damaged log is put right and heard later
            for event in run.events():
                if event.kind == "plan":
                    self._steps = int(event.values["steps"])

    def event(self, event: Event) -> None:
        """Steps and their losses, held-out losses."""
        if event.kind == "plan":
            self._steps = int(event.values["steps"])
        elif event.kind == "evaluation" and event.values.get("loss") is not None:
            self._facts["held-out loss"] = f"{event.values['loss']:.3f}"
        elif event.kind == "step":
            self.tick("train", event.step, self._steps)
            self._bar.set_postfix({"loss": f"{event.values['loss']:.3f}", **self._facts}, refresh=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None
