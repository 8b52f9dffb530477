"""The display of a run at work: live on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial, partialmethod
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from tunesmith.cli import render
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, is_drawn, json_line
from tunesmith.errors import Stopped
from tunesmith.evaluation.report.advice import next_command
from tunesmith.evaluation.series import RunSeries
from tunesmith.parallel.world import place_of
from tunesmith.phrases import command, one_line, percent, plural, visible
from tunesmith.summaries.words import PHASES, choice_line, first_facts, metric_line, plan_facts, step_line
from tunesmith.types import Event, Record

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Data
    from tunesmith.runs.folder import Run
    from tunesmith.training.trainer import Listener

MOST_FIRST = 10
"""Lines of a plan before the first step, to which one or two on the untouched model come."""
PLAIN_STEP_LINES = 10
"""Most step lines of a plain log, besides one every PLAIN_SECONDS."""
PLAIN_SECONDS = 30.0
PLAIN_WAIT_S = 2.0
"""Seconds before the first line on progress where lines are all there is."""
MOST_ANSWERS = 4
REFRESH_PER_SECOND = 8
MEASURED_WORDS = {"evaluation": "held-out ", "answers": "answers: ", "general": ""}
WHEN = {"before": "untouched model", "after": "tuned model"}


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing. Displays derive from it: they get every event, progress and note, in order."""

    verbose = False

    def __init__(self, series: RunSeries) -> None:
        self.series = series

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def event(self, event: Event) -> None:
        self.series.add(event)

    def progress(self, what: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None:
        """Show a line to the person, above whatever is live."""


class Plain(Silent):
    """Whole lines, one a fact, that read well in a log."""

    def __init__(self, console: Console, series: RunSeries, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(series)
        self.console, self.clock = console, clock
        self.last_line = -PLAIN_SECONDS
        self.tick = progress_lines(console, PHASES)

    def say(self, text: str) -> None:
        self.console.print(visible(text))

    def progress(self, what: str, done: int, total: int) -> None:
        self.tick(what, done, total)

    def event(self, event: Event) -> None:
        super().event(event)
        if event.kind == "plan":
            print_start(self.console, self.series.plan, verbose=self.verbose)
        elif event.kind == "step" and self._step_is_due(event):
            self.say(step_line(self.series))
        elif event.kind == "end":
            render.print_result(self.console, self.series.report)
        elif line := event_line(event, self.series, verbose=self.verbose):
            self.say(line)

    def _step_is_due(self, event: Event) -> bool:
        total, now = self.series.total_steps, self.clock()
        regular = event.step in (1, total) or event.step % max(1, -(-total // PLAIN_STEP_LINES)) == 0
        if regular or now - self.last_line >= PLAIN_SECONDS:
            self.last_line = now
            return True
        return False


def bars(screen: Console) -> Progress:
    """Bars below the last printed line of a terminal, with words before and `more` words after."""
    columns = (
        SpinnerColumn("dots", style=render.ACCENT_STYLE),
        TextColumn("{task.description}"),
        BarColumn(24, complete_style=render.ACCENT_STYLE),
    )
    more = TextColumn("{task.fields[more]}", style=render.MUTED_STYLE)
    return Progress(*columns, more, console=screen, transient=True, refresh_per_second=REFRESH_PER_SECOND)


class Live(Silent):
    """Prints what stays, and keeps what moves in a live area below it."""

    def __init__(self, console: Console, series: RunSeries) -> None:
        super().__init__(series)
        self.console, self.area = console, bars(console)
        self.phase = self.area.add_task("getting ready", total=1, more="")
        self.steps = self.area.add_task("", visible=False, more="")

    def __enter__(self) -> Live:
        self.area.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.area.stop()

    def say(self, text: str) -> None:
        self.console.print(Text(visible(text), style=render.MUTED_STYLE))

    def progress(self, what: str, done: int, total: int) -> None:
        show_phase(self.area, self.phase, PHASES.get(what, what), done, total)

    def event(self, event: Event) -> None:
        super().event(event)
        self.area.update(self.phase, visible=False)
        values, console = event.values, self.console
        if event.kind == "step":
            words, _, more = step_line(self.series).partition(": ")
            total = self.series.total_steps
            self.area.update(self.steps, description=words, completed=event.step, total=total, more=more, visible=True)
        elif event.kind == "plan":
            print_start(console, self.series.plan, verbose=self.verbose)
            if (
                self.verbose and values.get("sample") and not values.get("labels")
            ):  # a class is not a token: the plan counts the classes
                spans = [tuple(span) for span in values["sample"]]
                console.print(render.sample_row(spans, in_color=console.color_system is not None), "")
        elif event.kind == "end":
            self.area.stop()
            render.print_result(console, self.series.report)
            if self.series.samples:
                console.print(render.answers_table(self.series.samples, width=console.width, most=MOST_ANSWERS))
        elif values.get("name") != "after" and (line := event_line(event, self.series, verbose=self.verbose)):
            console.print(visible(line), style="yellow" if event.kind == "note" else "")


def show_phase(area: Progress, task: TaskID, words: str, done: int, total: int) -> None:
    """Show how far a phase is, by its share if that is known."""
    share = percent(done / total, 0) if total > 1 else ""
    area.update(task, description=words, completed=done, total=max(total, 1), more=share, visible=True)


def display_for(console: Console, *, quiet: bool, series: RunSeries, verbose: bool = False) -> Silent:
    """The display that suits the console. `series` may already hold an earlier part of the run."""
    if quiet:
        return Silent(series)
    (display := (Live if console.is_terminal else Plain)(console, series)).verbose = verbose
    return display


def event_line(event: Event, series: RunSeries, *, verbose: bool = False) -> str:
    """One line on a measurement, a note, or a resumption; "" for other events and for what waits for the result
    or needs no action, unless `verbose`."""
    if not verbose and event.kind in ("answers", "general") and event.values["name"] == "before":
        return ""  # the table at the end has them
    if event.kind in MEASURED_WORDS:
        when = WHEN.get(event.values["name"], f"step {event.step}")
        return f"{when}: {MEASURED_WORDS[event.kind]}{metric_line(event, series)}"
    if event.kind == "note":
        is_aside = event.values.get("detail") or event.values.get("aside")
        return "" if is_aside and not verbose else f"note: {event.values['text']}"
    return f"resumed after step {event.step} of {series.total_steps}" if event.kind == "resume" else ""


def plan_lines(plan: Record) -> list[str]:
    """A plan as whole lines: facts, choices, notes."""
    lines = [f"{name}: {text}" for name, text in plan_facts(plan)]
    lines += [choice_line(choice) for choice in plan.get("choices", ())]
    return lines + [f"note: {text}" for text in plan.get("warnings", ())]


def print_plan(screen: Console, plan: Record) -> None:
    """A plan as a panel with notes below on a terminal, in whole lines elsewhere."""
    lines, style = plan_lines(plan), ""
    if screen.is_terminal:
        screen.print(render.plan_panel(plan))
        lines, style = [f"note: {text}" for text in plan.get("warnings", ())], "yellow"
    for line in lines:
        screen.print(visible(line), style=style)


def print_start(screen: Console, plan: Record, *, verbose: bool) -> None:
    """The plan before the first step: facts and what is unusual in `MOST_FIRST` lines; all if `verbose`."""
    if verbose:
        print_plan(screen, plan)
        return
    facts = first_facts(plan)
    lines = "\n".join(f"{name}: {text}" for name, text in facts)
    screen.print(render.facts_grid(facts, a_line_each=True) if screen.is_terminal else lines)
    notes, choices = plan.get("warnings", ()), plan.get("choices", ())
    to_act_on = [f"note: {text}" for text in notes if text not in plan.get("asides", ())]
    unusual = [choice_line(choice) for choice in choices if choice["key"] in plan.get("unusual", ())]
    room = MOST_FIRST - 1 - len(facts)
    shown = [*to_act_on, *unusual][:room]
    for others, text in zip(reversed(range(len(shown))), shown, strict=True):
        line = " ".join(visible(text).split())
        if len(Text(line).wrap(screen, screen.width)) > room - others:
            line = one_line(line, screen.width)
        screen.print(line, style="yellow" if screen.is_terminal else "")
        room -= len(Text(line).wrap(screen, screen.width))
    num_notes = min(len(to_act_on), len(shown))
    left = {"choice": len(choices) - len(shown) + num_notes, "note": len(notes) - num_notes}
    if words := " and ".join(plural(num, f"more {noun}") for noun, num in left.items() if num):
        screen.print(f"{words}: `tunesmith show` lists all, and --verbose", style=render.MUTED_STYLE)


@contextmanager
def phases(screen: Console, words: Mapping[str, str] = PHASES) -> Iterator[Callable[[str, int, int], None]]:
    """One bar that moves from each phase to the next; elsewhere a line now and then, of what takes long."""
    if not screen.is_terminal:
        yield progress_lines(screen, words)
        return
    with bars(screen) as area:
        bar = area.add_task("", visible=False, more="")
        yield lambda what, done, total: show_phase(area, bar, words.get(what, what), done, total)


@lru_cache
def plain_bars() -> None:
    """Let bars of libraries (downloads) be whole lines every `PLAIN_SECONDS` if stderr is not a terminal."""
    if not is_drawn(sys.stderr):
        from tqdm import tqdm

        pace = {"mininterval": PLAIN_SECONDS, "delay": PLAIN_WAIT_S}
        tqdm.__init__ = partialmethod(tqdm.__init__, **pace)  # type: ignore[assignment, method-assign]
        tqdm.status_printer = staticmethod(  # type: ignore[method-assign]
            lambda file: partial(print, file=file, flush=True)
        )
        tqdm.moveto = lambda self, n: None  # type: ignore[method-assign]
        tqdm.leave = property(lambda _: True, lambda _, value: None)  # type: ignore[assignment]


def progress_lines(screen: Console, words: Mapping[str, str]) -> Callable[[str, int, int], None]:
    """Progress as a line every `PLAIN_SECONDS`, the first after `PLAIN_WAIT_S`, and one at the end of a phase
    that has had a line."""
    plain_bars()
    due, shown = time.monotonic() + PLAIN_WAIT_S, ""

    def line(what: str, done: int, total: int) -> None:
        nonlocal due, shown
        is_end = done >= total > 1
        if time.monotonic() >= due or (is_end and what == shown):
            due, shown = time.monotonic() + PLAIN_SECONDS, "" if is_end else what
            share = f": {percent(done / total, 0)}" if total > 1 else ""
            screen.print(visible(f"{words.get(what, what)}{share}"))

    return line


def pinned(data: Data, *, offline: bool) -> Data:
    """The data with addresses pinned, which is said on stderr."""
    from tunesmith.data.addresses import pin

    pinned_data, notes = pin(data, offline=offline)
    for note in notes:
        console(stderr=True).print(visible(f"note: {note}"), style="bright_black")
    return pinned_data


@dataclass
class RunDisplay:
    """The display of one run with its signals and last words, for `train` and `resume`."""

    display: Silent
    console: Console
    series: RunSeries
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
        if is_measuring and self.should_stop() and place_of(os.environ).size == 1:  # groups stop between steps
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
            if self.as_json:
                json_line({"kind": "tracking", "sent": False, "text": text})
            self.console.print(visible(text), style="yellow", soft_wrap=True)

    def close(self) -> None:
        """Take away what is live."""
        self.display.__exit__(None, None, None)

    def done(self, run: Run) -> None:
        """Print where the result is and what to do with it."""
        from tunesmith.tasks import TASKS

        self.close()
        if self.as_json:
            json_line({"kind": "result", "run": str(run.path), "report": str(run.report_path)})
        elif self.quiet:
            self.console.print(str(run.path))
        else:
            page = run.path / "report.html"
            self.console.print(f"\nresult: {run.path}", soft_wrap=True)
            if page.exists():
                is_link = self.console.is_terminal and self.console.color_system  # else no OSC 8 is written
                place = page.resolve()
                shown = Text(str(page), style=f"link {place.as_uri()}") if is_link else str(place)
                self.console.print(Text.assemble("report: ", shown), soft_wrap=True)
            self.console.print("\nNext:\n")
            task = TASKS.get(self.series.plan.get("task", ""))
            better = self.series.report.get("try_next", ())[:1]
            for verb, *more in task.next_commands if task else (("eval", "FILE"), ("show",)):
                if verb != "show" or not better:
                    self.console.print(f"  {command(verb, run.path, *more)}", soft_wrap=True)
            for advice in better:
                words = f"  {next_command(run.path, advice)}\n    {visible(advice['why'])}"
                self.console.print(words, soft_wrap=True)


@contextmanager
def run_display(
    *, as_json: bool, quiet: bool, verbose: bool = False, earlier: Iterable[Event] = (), follows: bool = False
) -> Iterator[RunDisplay]:
    """A display for one run; `earlier` are the events of a run that is resumed. One that `follows` a run of
    another rank hears no event, and knows from its folder that it has begun."""
    series = RunSeries.of(earlier)
    series.started = False
    screen = console(stderr=as_json)
    display = display_for(screen, quiet=quiet, series=series, verbose=verbose)
    runs: list[Run] = []

    def leave() -> None:
        screen.show_cursor(True)
        for run in runs:
            words = f"\nstopped at once; continue from its last checkpoint with: {command('resume', run.path)}\n"
            os.write(2, words.encode("utf-8", "backslashreplace"))  # the display may be in the middle of a line

    with (
        display,
        stopping_on_signals(
            has_begun=lambda: series.started or (follows and bool(runs)), say=display.say, at_once=leave
        ) as should_stop,
    ):
        yield RunDisplay(display, screen, series, should_stop, as_json, quiet, runs)
