"""tunesmith show"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.options import Json, Root, RunName, remember_json

MOST_ANSWERS = 16
"""Shown."""

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.cli.story import Story
    from tunesmith.runs.folder import Run


def show(ctx: typer.Context, run: RunName = "last", root: Root = Path("runs"), as_json: Json = False) -> None:
    """Show a run: its plan, its curves, what it measured and what it answered.

    tunesmith show last
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.output import console, json_page
    from tunesmith.cli.runs import facts
    from tunesmith.cli.story import Story
    from tunesmith.runs.folder import Run

    found = Run.open(run, root)
    if as_json:
        typer.echo(json_page(facts(found) | {"report": _report(found)}))
        return
    screen = console()
    _head(screen, found)
    story = Story.of(found.events())
    report = _report(found)
    if story.plan:
        _plan(screen, story, report)
    _measures(screen, story, report)
    _tail(screen, found)


def _report(run: Run) -> dict[str, Any] | None:
    """The report of a finished run, judged as this version does; None before there is one."""
    if not run.report_path.exists():
        return None
    from tunesmith.evaluation.report.build import up_to_date

    return up_to_date(run, run.read_json("report.json"))


def _head(screen: Console, run: Run) -> None:
    from tunesmith.cli.text import visible

    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
    screen.print(f"{visible(str(run.path))}: {run.state()}, made {made}")


def _plan(screen: Console, story: Story, report: Mapping[str, Any] | None) -> None:
    """What was planned; of a finished run what it took instead of what was predicted."""
    from tunesmith.cli.panels import plan_facts, plan_panel
    from tunesmith.cli.text import visible

    plan = story.plan if report is None else {**story.plan, "forecast": None, "took": took(report)}
    if screen.is_terminal:
        screen.print(plan_panel(plan))
        return
    for name, text in plan_facts(plan):
        screen.print(f"{name}: {visible(text)}")


def took(report: Mapping[str, Any]) -> str:
    """The time and memory that a finished run took."""
    from tunesmith.cli.text import size
    from tunesmith.formatting import duration

    parts = {"prepare": "to prepare", "train": "to train", "evaluate": "to measure"}
    spans = [f"{duration(report['seconds'][part])} {words}" for part, words in parts.items()]
    return f"{', '.join(spans)}; at most {size(report['peak_memory_bytes'])} of memory"


def _measures(screen: Console, story: Story, report: Mapping[str, Any] | None) -> None:
    from tunesmith.cli.panels import answers, scores
    from tunesmith.cli.text import loss, sparkline
    from tunesmith.formatting import plural

    if story.losses:
        first, last = story.losses[min(story.losses)], story.losses[max(story.losses)]
        screen.print(
            f"training loss {loss(first)} {sparkline(story.smoothed())} {loss(last)}, {plural(story.step, 'step')}"
        )
    if len(story.curve) > 1:
        kept = story.report.get("kept", {}).get("step", story.step)
        aside = "" if kept == story.step else f", kept: step {kept:,}"
        screen.print(f"held-out loss {loss(story.curve[0])} {sparkline(story.curve)} {loss(story.curve[-1])}{aside}")
    if report is not None and report["metrics"]["after"] is not None:
        screen.print(scores(report))
    if story.samples:
        samples = [story.samples[index] for index in sorted(story.samples)]
        if len(samples) > MOST_ANSWERS:
            screen.print(f"{MOST_ANSWERS} of {len(samples):,} answers; the report has all")
        screen.print(answers(samples, width=min(screen.width, 120), most=MOST_ANSWERS))


def _tail(screen: Console, run: Run) -> None:
    """What went wrong, if anything did, and what can be done next."""
    from tunesmith.cli.text import visible
    from tunesmith.formatting import command

    last = None
    for event in run.events():
        last = event
    if last is not None and last.kind == "failed":
        screen.print(f"failed after step {last.step}: {visible(str(last.values.get('message', '')))}")
    state = run.state()
    if state in ("stopped", "interrupted", "failed"):
        screen.print(f"continue with: {command('resume', run.path)}", soft_wrap=True)
    elif state == "done":
        kind = "adapter" if run.adapter_path.exists() else "model"
        screen.print(f"{kind} in {run.path / kind}, report in {run.path / 'report.html'}")
