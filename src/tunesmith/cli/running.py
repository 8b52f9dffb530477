"""What `train` and `resume` share: a display that listens to a run, signals that stop it, and the last words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from tunesmith.cli.display import Display, display_for
from tunesmith.cli.export import make_planned
from tunesmith.cli.output import console, json_line
from tunesmith.cli.stopping import stopping_on_signals
from tunesmith.cli.story import Story
from tunesmith.cli.text import visible
from tunesmith.formatting import command
from tunesmith.tasks import TASKS
from tunesmith.types import Event

if TYPE_CHECKING:
    from collections.abc import Callable

    from tunesmith.runs.folder import Run
    from tunesmith.training.trainer import Listener


@dataclass
class Watch:
    """Ears and voice of one run."""

    display: Display
    console: Console
    story: Story
    should_stop: Callable[[], bool]
    as_json: bool
    quiet: bool
    runs: list[Run]
    """The one at work, once its folder is there."""

    def listener(self) -> Listener:
        from tunesmith.training.trainer import Listener

        return Listener(self._hear, self.display.progress, self.should_stop, self.runs.append)

    def _hear(self, event: Event) -> None:
        if self.as_json:
            json_line(asdict(event))
        self.display.event(event)

    def note(self, text: str) -> None:
        """What a person should know before the run begins."""
        if not self.quiet:
            self.console.print(visible(f"note: {text}"), style="bright_black")

    def done(self, run: Run) -> None:
        """Say where the result is and what to do with it, and make the exports that its recipe asks for."""
        self.display.__exit__(None, None, None)
        if self.as_json:
            json_line({"kind": "result", "run": str(run.path), "report": str(run.report_path)})
        elif self.quiet:
            self.console.print(str(run.path))
        else:
            self.console.print(f"\nThe result is in {run.path}, its report in report.html. Go on with:\n")
            for verb, *more in next_verbs(str(self.story.plan.get("task", ""))):
                self.console.print(f"  {command(verb, run.path, *more)}", soft_wrap=True)
        make_planned(run, as_json=self.as_json)


def next_verbs(task: str) -> list[tuple[str, ...]]:
    """What to do with the result of a task: verbs, and what follows a run's name."""
    return list(TASKS[task].next_commands)


@contextmanager
def watched(*, as_json: bool, quiet: bool, earlier: Iterable[Event] = ()) -> Iterator[Watch]:
    """A display for one run. `earlier` is what a resumed run has told before."""
    story = Story.of(earlier)
    story.started = False
    screen = console(stderr=as_json)
    display = display_for(screen, quiet=quiet, story=story)

    runs: list[Run] = []

    def put_right() -> None:
        screen.show_cursor(True)
        for run in runs:
            words = f"\nleft at once; go on from its last checkpoint with: {command('resume', run.path)}\n"
            os.write(2, words.encode("utf-8", "backslashreplace"))  # the display may be in the middle of a line

    with (
        display,
        stopping_on_signals(has_begun=lambda: story.started, say=display.say, at_once=put_right) as should_stop,
    ):
        yield Watch(display, screen, story, should_stop, as_json, quiet, runs)
