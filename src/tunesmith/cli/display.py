"""The display of a run at work: live on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tunesmith.cli.history import RunHistory
from tunesmith.cli.render import (
    ACCENT,
    MUTED,
    answers_table,
    loss,
    metric_line,
    metric_lines,
    option,
    plan_facts,
    plan_panel,
    result,
    sample_row,
    sparkline,
    visible,
)
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import Stopped
from tunesmith.parallel.world import place_of
from tunesmith.phrases import PHASES, command, duration, size
from tunesmith.types import Event

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Data
    from tunesmith.runs.folder import Run
    from tunesmith.training.trainer import Listener

PLAIN_STEP_LINES = 50
"""Most step lines of a plain log, besides one every PLAIN_SECONDS."""
PLAIN_SECONDS = 30.0
PLAIN_WAIT_S = 2.0
"""Seconds before the first line on the progress of a command that is no run."""
MOST_ANSWERS = 4
REFRESH_PER_SECOND = 8
MEASURED = {"evaluation": "held-out ", "answers": "answers: ", "general": ""}


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing. Displays derive from it: they get every event, progress and note, in order."""

    def __init__(self, history: RunHistory) -> None:
        self.history = history

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def event(self, event: Event) -> None:
        self.history.update(event)

    def progress(self, what: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None:
        """Show a line to the person, above whatever is live."""


class Plain(Silent):
    """Whole lines, one a fact, that read well in a log."""

    def __init__(self, console: Console, history: RunHistory, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(history)
        self.console, self.clock = console, clock
        self.phase, self.last_line = "", -PLAIN_SECONDS

    def say(self, text: str) -> None:
        self.console.print(visible(text))

    def progress(self, what: str, done: int, total: int) -> None:
        now, words = self.clock(), PHASES.get(what, what)
        if what != self.phase:
            self.phase, self.last_line = what, now
            self.say(words)
        elif now - self.last_line >= PLAIN_SECONDS and total:
            self.last_line = now
            self.say(f"{words}: {100 * done / total:.0f} %")

    def event(self, event: Event) -> None:
        super().event(event)
        for line in self._lines(event):
            self.say(line)

    def _lines(self, event: Event) -> list[str]:
        lines: dict[str, Callable[[], list[str]]] = {
            "plan": lambda: plan_lines(self.history.plan),
            "evaluation": lambda: [f"held out at step {event.step}: {metric_line(event, self.history)}"],
            "answers": lambda: [f"answers at step {event.step}: {metric_line(event)}"],
            "general": lambda: [f"general ability at step {event.step}: {metric_line(event)}"],
            "step": lambda: [self.step_line()] if self._step_is_due(event) else [],
            "note": lambda: [f"note: {event.values['text']}"],
            "resume": lambda: [f"resumed after step {event.step}"],
            "end": lambda: result_lines(self.history.report),
        }
        return lines.get(event.kind, list)()

    def _step_is_due(self, event: Event) -> bool:
        total, now = self.history.total_steps, self.clock()
        regular = event.step in (1, total) or event.step % max(1, total // PLAIN_STEP_LINES) == 0
        if regular or now - self.last_line >= PLAIN_SECONDS:
            self.last_line = now
            return True
        return False

    def step_line(self) -> str:
        history, left = self.history, self.history.seconds_left
        return (
            f"step {history.step}/{history.total_steps}: loss {loss(history.last['loss'])}, "
            f"lr {history.last['lr']:.3g}, {history.tokens_per_second:,.0f} tokens/s, {size(history.peak_bytes)}"
            + (f", {duration(left)} left" if left is not None and history.step < history.total_steps else "")
        )


class Live(Silent):
    """Prints what stays, and keeps what moves in a live area below it."""

    def __init__(self, console: Console, history: RunHistory) -> None:
        super().__init__(history)
        self.console = console
        self.phase: tuple[str, int, int] | None = None
        self.area = rich.live.Live(
            console=console, get_renderable=self.moving, refresh_per_second=REFRESH_PER_SECOND, transient=True
        )

    def __enter__(self) -> Live:
        self.area.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.phase = None
        self.area.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(visible(text), style=MUTED))

    def progress(self, what: str, done: int, total: int) -> None:
        self.phase = (what, done, total)

    def event(self, event: Event) -> None:
        super().event(event)
        self.phase = None
        values, console = event.values, self.console
        if event.kind == "plan":
            console.print(plan_panel(self.history.plan))
            if values.get("sample") and not values.get("labels"):  # a class is no token: the plan counts the classes
                spans = [tuple(span) for span in values["sample"]]
                console.print(sample_row(spans, in_color=console.color_system is not None), "")
            for text in values.get("warnings", ()):
                self._note(text)
        elif event.kind in MEASURED and values["name"] != "after":
            when = "untouched model" if values["name"] == "before" else f"step {event.step}"
            line = metric_line(event, self.history)
            console.print(Text.assemble((f"{when}: ", "bold"), (MEASURED[event.kind], MUTED), line))
        elif event.kind == "note":
            self._note(values["text"])
        elif event.kind == "resume":
            console.print(Text(f"resumed after step {event.step} of {self.history.total_steps}", style=ACCENT))
        elif event.kind == "end":
            self._end()

    def _note(self, text: str) -> None:
        self.console.print(Text.assemble(("note: ", "yellow"), visible(text)))

    def _end(self) -> None:
        history = self.history
        self.area.stop()
        if history.report.get("headline") and history.report["metrics"]["after"] is not None:
            self.console.print(result(history.report))
        if history.samples:
            self.console.print(answers_table(history.samples, width=self.console.width, most=MOST_ANSWERS))

    def moving(self) -> RenderableType:
        """The live area below the last printed line."""
        parts: list[RenderableType] = []
        if self.history.last:
            parts += [self._bar(), self._curves()]
        if self.phase:
            parts.append(_phase(*self.phase))
        elif not self.history.last:
            parts.append(Spinner("dots", Text("getting ready", style=MUTED), style=ACCENT))
        return Group(*parts)

    def _bar(self) -> Table:
        """Step, loss, learning rate, tokens/s, memory, time left."""
        history, left = self.history, self.history.seconds_left
        table = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(history.total_steps, 1), completed=history.step, width=24, complete_style=ACCENT)
        facts = Text.assemble(
            (f"loss {loss(history.last['loss'])}", "bold"),
            (f"  rate {history.last['lr']:.2e}", MUTED),
            f"  {history.tokens_per_second:,.0f} tokens/s",
            (f"  {size(history.peak_bytes)}", MUTED),
            f"  {duration(left)} left" if left is not None else "",
        )
        table.add_row(Text(f"step {history.step}/{history.total_steps}"), bar, facts)
        return table

    def _curves(self) -> Text:
        text = Text("training ", style=MUTED)
        text.append(sparkline(self.history.smoothed(), 24), style=ACCENT)
        curve = self.history.curve
        if len(curve) > 1:
            text.append("   held out ", style=MUTED)
            text.append(f"{loss(curve[0])} ")
            text.append(sparkline(curve, 24), style="green")
            text.append(f" {loss(curve[-1])}")
        return text


def _phase(what: str, done: int, total: int) -> RenderableType:
    words = PHASES.get(what, what)
    if total <= 1:
        return Spinner("dots", Text(words, style=MUTED), style=ACCENT)
    share = TextColumn("{task.percentage:.0f} %")
    progress = Progress(TextColumn("{task.description}"), BarColumn(24), share)
    progress.add_task(words, total=total, completed=done)
    return progress.make_tasks_table(progress.tasks)


def display_for(console: Console, *, quiet: bool, history: RunHistory) -> Silent:
    """The display that suits the console. `history` may already hold an earlier part of the run."""
    if quiet:
        return Silent(history)
    return Live(console, history) if console.is_terminal else Plain(console, history)


def result_lines(report: Mapping[str, Any]) -> list[str]:
    """The result of a run as whole lines; none where nothing was measured."""
    if not report.get("headline") or report["metrics"]["after"] is None:
        return []
    return [" ".join(report["headline"]), *metric_lines(report)]


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """A plan as whole lines: facts, choices, notes."""
    lines = [f"{name}: {text}" for name, text in plan_facts(plan)]
    lines += [f"chosen: {c['key']} = {option(c['value'])}: {c['reason']}" for c in plan["choices"]]
    return lines + [f"note: {text}" for text in plan.get("warnings", ())]


@contextmanager
def progress_bar(screen: Console, words: str) -> Iterator[Callable[[int, int], None]]:
    """The progress of one thing, see `phases`."""
    with phases(screen, {words: words}) as progress:
        yield lambda done, total: progress(words, done, total)


@contextmanager
def phases(screen: Console, words: Mapping[str, str] = PHASES) -> Iterator[Callable[[str, int, int], None]]:
    """One bar that moves from each phase to the next; not on a terminal a line now and then, of what takes long."""
    if not screen.is_terminal:
        due = time.monotonic() + PLAIN_WAIT_S

        def line(what: str, done: int, total: int) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + PLAIN_SECONDS
                screen.print(visible(words.get(what, what) + (f": {100 * done / total:.0f} %" if total > 1 else "")))

        yield line
        return
    columns = TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as progress:
        bar = progress.add_task("")
        now = ""

        def tick(what: str, done: int, total: int) -> None:
            nonlocal now
            if what != now:
                now = what
                progress.reset(bar, description=words.get(what, what))
            progress.update(bar, completed=done, total=total)

        yield tick


def fetched(data: Data, *, offline: bool) -> Data:
    """The data with addresses pinned, said on stderr, and their files on this machine as far as they fit."""
    from tunesmith.data.addresses import fetch, pin

    screen = console(stderr=True)
    pinned, notes = pin(data, offline=offline)
    for note in notes:
        screen.print(visible(f"note: {note}"), style="bright_black")
    with phases(screen) as progress:
        fetch(pinned, progress)
    return pinned


@dataclass
class RunDisplay:
    """The display of one run with its signals and last words, for `train` and `resume`."""

    display: Silent
    console: Console
    history: RunHistory
    should_stop: Callable[[], bool]
    as_json: bool
    quiet: bool
    runs: list[Run]
    """The run at work, once its folder is there."""

    def listener(self, on_run: Callable[[Run], None] = lambda run: None) -> Listener:
        """The listener of the run; `on_run` is called too once its folder exists."""
        from tunesmith.training.trainer import Listener

        def begin(run: Run) -> None:
            self.runs.append(run)
            on_run(run)

        return Listener(self._on_event, self.display.progress, self.should_stop, begin)

    def _on_event(self, event: Event) -> None:
        if self.as_json:
            json_line(asdict(event))
        self.display.event(event)
        is_measuring = event.kind == "sample" or event.values.get("name") in ("before", "after")
        if is_measuring and self.should_stop() and place_of(os.environ).size == 1:  # a group stops between steps
            raise Stopped(f"stopped while measuring; resume with: {command('resume', self.runs[-1].path)}")

    def note(self, text: str) -> None:
        """Print a note before the run begins."""
        if not self.quiet:
            self.console.print(visible(f"note: {text}"), style="bright_black")

    def tracked(self, is_sent: bool, text: str) -> None:
        """Print what a tracker got; what it did not get is said in any case."""
        if is_sent:
            self.note(text)
        else:
            self.console.print(visible(text), style="yellow", soft_wrap=True)

    def done(self, run: Run) -> None:
        """Print where the result is and what to do with it."""
        from tunesmith.tasks import TASKS

        self.display.__exit__(None, None, None)
        if self.as_json:
            json_line({"kind": "result", "run": str(run.path), "report": str(run.report_path)})
        elif self.quiet:
            self.console.print(str(run.path))
        else:
            self.console.print(f"\nThe result is in {run.path}, its report in report.html. Next:\n")
            task = TASKS.get(self.history.plan.get("task", ""))
            for verb, *more in task.next_commands if task else (("eval", "FILE"), ("show",)):
                self.console.print(f"  {command(verb, run.path, *more)}", soft_wrap=True)


@contextmanager
def run_display(
    *, as_json: bool, quiet: bool, earlier: Iterable[Event] = (), follows: bool = False
) -> Iterator[RunDisplay]:
    """A display for one run; `earlier` are the events of a run that is resumed. One that `follows` a run of another
    rank hears no event, and knows from its folder that it has begun."""
    history = RunHistory.of(earlier)
    history.started = False
    screen = console(stderr=as_json)
    display = display_for(screen, quiet=quiet, history=history)
    runs: list[Run] = []

    def leave() -> None:
        screen.show_cursor(True)
        for run in runs:
            words = f"\nstopped at once; continue from its last checkpoint with: {command('resume', run.path)}\n"
            os.write(2, words.encode("utf-8", "backslashreplace"))  # the display may be in the middle of a line

    with (
        display,
        stopping_on_signals(
            has_begun=lambda: history.started or (follows and bool(runs)), say=display.say, at_once=leave
        ) as should_stop,
    ):
        yield RunDisplay(display, screen, history, should_stop, as_json, quiet, runs)
