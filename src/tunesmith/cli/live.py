"""A run on a terminal: the plan, a bar that moves, curves of blocks, and the difference that training made."""

from __future__ import annotations

from types import TracebackType

import rich.live
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from tunesmith.cli.display import PHASES, Silent
from tunesmith.cli.panels import ACCENT, answers, plan_panel, sample_row, scores
from tunesmith.cli.scores import MUTED, score_line
from tunesmith.cli.story import Story
from tunesmith.cli.text import loss, size, sparkline, visible
from tunesmith.formatting import duration
from tunesmith.types import Event

MOST_ANSWERS = 4
REFRESH_PER_SECOND = 8
MEASURED = {"evaluation": "held-out ", "answers": "answers: ", "general": ""}


class Live(Silent):
    """Prints what stays, and keeps what moves in a live area below it."""

    def __init__(self, console: Console, story: Story) -> None:
        super().__init__(story)
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
            console.print(plan_panel(self.story.plan))
            if values.get("sample") and not values.get("labels"):  # a class is no token: the plan counts the classes
                console.print(sample_row([tuple(span) for span in values["sample"]]), "")
            for text in values.get("warnings", ()):
                self._note(text)
        elif event.kind in MEASURED and values["name"] != "after":
            told = score_line(event, self.story)
            what = "untouched model" if values["name"] == "before" else f"step {event.step}"
            console.print(Text.assemble((f"{what}: ", "bold"), (MEASURED[event.kind], MUTED), told))
        elif event.kind == "note":
            self._note(values["text"])
        elif event.kind == "resume":
            console.print(Text(f"resumed after step {event.step} of {self.story.total_steps}", style=ACCENT))
        elif event.kind == "end":
            self._end()

    def _note(self, text: str) -> None:
        self.console.print(Text.assemble(("note: ", "yellow"), visible(text)))

    def _end(self) -> None:
        story = self.story
        self.area.stop()
        if story.report.get("headline") and story.report["metrics"]["after"] is not None:
            self.console.print(scores(story.report))
        if story.samples:
            samples = [story.samples[index] for index in sorted(story.samples)]
            self.console.print(answers(samples, width=self.console.width, most=MOST_ANSWERS))

    def moving(self) -> RenderableType:
        """What stands below the last printed line right now."""
        parts: list[RenderableType] = []
        if self.story.last:
            parts += [self._bar(), self._curves()]
        if self.phase:
            parts.append(_phase(*self.phase))
        elif not self.story.last:
            parts.append(Spinner("dots", Text("getting ready", style=MUTED), style=ACCENT))
        return Group(*parts)

    def _bar(self) -> Table:
        """Step, loss, rate, tokens/s, memory, time left."""
        story = self.story
        left = story.seconds_left
        table = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(story.total_steps, 1), completed=story.step, width=24, complete_style=ACCENT)
        facts = Text.assemble(
            (f"loss {loss(story.last['loss'])}", "bold"),
            (f"  rate {story.last['lr']:.2e}", MUTED),
            f"  {story.tokens_per_second:,.0f} tokens/s",
            (f"  {size(story.peak_bytes)}", MUTED),
            f"  {duration(left)} left" if left is not None else "",
        )
        table.add_row(Text(f"step {story.step}/{story.total_steps}"), bar, facts)
        return table

    def _curves(self) -> Text:
        text = Text("training ", style=MUTED)
        text.append(sparkline(self.story.smoothed(), 24), style=ACCENT)
        curve = self.story.curve
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
