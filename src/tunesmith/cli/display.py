"""A run on the screen, drawn from its events: live on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from tunesmith.cli.scores import score_line, score_lines
from tunesmith.cli.story import Story
from tunesmith.cli.text import loss, option, size, visible
from tunesmith.formatting import duration
from tunesmith.types import Event

PHASES = {
    "read": "reading rows",
    "hash": "fingerprinting data",
    "encode": "encoding rows",
    "load": "loading the model",
    "plan": "predicting memory and time",
    "probe": "trying the heaviest step",
    "evaluate": "measuring held-out rows",
    "answer": "answering held-out prompts",
    "check": "checking rows",
    "general": "measuring general ability",
    "report": "drawing the report",
    "surprise": "looking for surprising training rows",
    "download": "downloading the model",
}
"""Words for what the engine reports progress of; an unknown name is shown as it is."""
PLAIN_STEP_LINES = 50
"""Most step lines of a plain log, beside one every PLAIN_SECONDS."""
PLAIN_SECONDS = 30.0


class Display(AbstractContextManager["Display"], Protocol):
    """Hears everything that happens, in order."""

    def event(self, event: Event) -> None: ...
    def progress(self, what: str, done: int, total: int) -> None: ...
    def say(self, text: str) -> None:
        """A line to the person, above whatever is live."""
        ...


def display_for(console: Console, *, quiet: bool, story: Story) -> Display:
    """The display that suits the console. `story` may already hold what an earlier part of the run told."""
    if quiet:
        return Silent(story)
    if console.is_terminal:
        from tunesmith.cli.live import Live  # drawing is not imported where nothing is drawn

        return Live(console, story)
    return Plain(console, story)


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """A plan as whole lines: facts, choices, notes."""
    from tunesmith.cli.panels import plan_facts

    lines = [f"{name}: {text}" for name, text in plan_facts(plan)]
    lines += [f"chosen: {c['key']} = {option(c['value'])}: {c['reason']}" for c in plan["choices"]]
    return lines + [f"note: {text}" for text in plan.get("warnings", ())]


class Silent:
    """Nothing is shown."""

    def __init__(self, story: Story) -> None:
        self.story = story

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None

    def event(self, event: Event) -> None:
        self.story.hear(event)

    def progress(self, what: str, done: int, total: int) -> None: ...

    def say(self, text: str) -> None: ...


class Plain(Silent):
    """Whole lines, one a fact, that read well in a log."""

    def __init__(self, console: Console, story: Story, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(story)
        self.console = console
        self.clock = clock
        self.phase = ""
        self.last_line = -PLAIN_SECONDS

    def say(self, text: str) -> None:
        self.console.print(visible(text))

    def progress(self, what: str, done: int, total: int) -> None:
        now = self.clock()
        if what != self.phase:
            self.phase = what
            self.say(PHASES.get(what, what))
            self.last_line = now
        elif now - self.last_line >= PLAIN_SECONDS and total:
            self.say(f"{PHASES.get(what, what)}: {done / total:.0%}")
            self.last_line = now

    def event(self, event: Event) -> None:
        super().event(event)
        for line in self._lines(event):
            self.say(line)

    def _lines(self, event: Event) -> list[str]:
        words: dict[str, Callable[[], list[str]]] = {
            "plan": self._plan_lines,
            "evaluation": lambda: [f"held out at step {event.step}: {score_line(event, self.story)}"],
            "answers": lambda: [f"answers at step {event.step}: {score_line(event)}"],
            "general": lambda: [f"general ability at step {event.step}: {score_line(event)}"],
            "step": lambda: [self.step_line()] if self._step_is_due(event) else [],
            "note": lambda: [f"note: {event.values['text']}"],
            "resume": lambda: [f"resumed after step {event.step}"],
            "end": self._end_lines,
        }
        return words.get(event.kind, list)()

    def _plan_lines(self) -> list[str]:
        return plan_lines(self.story.plan)

    def _step_is_due(self, event: Event) -> bool:
        total, now = self.story.total_steps, self.clock()
        regular = event.step in (1, total) or event.step % max(1, total // PLAIN_STEP_LINES) == 0
        if regular or now - self.last_line >= PLAIN_SECONDS:
            self.last_line = now
            return True
        return False

    def step_line(self) -> str:
        story = self.story
        left = story.seconds_left
        return (
            f"step {story.step}/{story.total_steps}: loss {loss(story.last['loss'])}, rate {story.last['lr']:.3g}, "
            f"{story.tokens_per_second:,.0f} tokens/s, {size(story.peak_bytes)}"
            + (f", {duration(left)} left" if left is not None and story.step < story.total_steps else "")
        )

    def _end_lines(self) -> list[str]:
        report = self.story.report
        if not report.get("headline") or report["metrics"]["after"] is None:
            return []
        from tunesmith.evaluation.report.text import metric_lines, sides

        return [" ".join(report["headline"]), *score_lines(metric_lines(report), sides(report))]
