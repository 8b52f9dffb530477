"""tunesmith show"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tunesmith.cli.options import Json, Root, RunName, remember_json

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.cli.story import Story
    from tunesmith.run import Run


def show(ctx: typer.Context, run: RunName = "last", root: Root = Path("runs"), as_json: Json = False) -> None:
    """Show a run: its plan, its curves, what it measured and what it answered.

    tunesmith show last
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.output import console, json_page
    from tunesmith.cli.runs import facts
    from tunesmith.cli.story import Story
    from tunesmith.run import Run

    found = Run.open(run, root)
    if as_json:
        report = found.read_json("report.json") if found.report_path.exists() else None
        typer.echo(json_page(facts(found) | {"report": report}))
        return
    screen = console()
    _head(screen, found)
    story = Story.of(found.events())
    if story.plan:
        _plan(screen, story)
    _measures(screen, story)
    _tail(screen, found)


def _head(screen: Console, run: Run) -> None:
    from tunesmith.cli.text import visible

    screen.print(f"{visible(str(run.path))}: {run.state()}")


def _plan(screen: Console, story: Story) -> None:
    from tunesmith.cli.panels import plan_facts, plan_panel
    from tunesmith.cli.text import visible

    if screen.is_terminal:
        screen.print(plan_panel(story.plan))
        return
    for name, text in plan_facts(story.plan):
        screen.print(f"{name}: {visible(text)}")


def _measures(screen: Console, story: Story) -> None:
    from tunesmith.cli.panels import answers, scores
    from tunesmith.cli.text import loss, sparkline

    if story.losses:
        first, last = story.losses[min(story.losses)], story.losses[max(story.losses)]
        screen.print(f"training loss {loss(first)} {sparkline(story.smoothed())} {loss(last)}, {story.step} steps")
    if len(story.curve) > 1:
        kept = story.report.get("kept", {}).get("step", story.step)
        aside = "" if kept == story.step else f", kept: step {kept:,}"
        screen.print(f"held-out loss {loss(story.curve[0])} {sparkline(story.curve)} {loss(story.curve[-1])}{aside}")
    if "after" in story.measures:
        screen.print(scores(story))
    if story.samples:
        samples = [story.samples[index] for index in sorted(story.samples)]
        screen.print(answers(samples, width=min(screen.width, 120), most=len(samples)))


def _tail(screen: Console, run: Run) -> None:
    """What went wrong, if anything did, and what can be done next."""
    from tunesmith.cli.text import visible
    from tunesmith.values import command

    last = None
    for event in run.events():
        last = event
    if last is not None and last.kind == "failed":
        screen.print(f"failed after step {last.step}: {visible(str(last.values.get('message', '')))}")
    state = run.state()
    if state in ("stopped", "interrupted", "failed"):
        screen.print(f"go on with: {command('resume', run.path)}", soft_wrap=True)
    elif state == "done":
        kind = "adapter" if run.adapter_path.exists() else "model"
        screen.print(f"{kind} in {run.path / kind}, report in {run.path / 'report.html'}")
