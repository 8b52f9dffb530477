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

    from tunesmith.cli.history import RunHistory
    from tunesmith.runs.folder import Run


def show(ctx: typer.Context, run: RunName = "last", root: Root = Path("runs"), as_json: Json = False) -> None:
    """Show a run: plan, loss curves, metrics and answers.

    tunesmith show last
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.history import RunHistory
    from tunesmith.cli.runs import facts
    from tunesmith.cli.streams import console, json_page
    from tunesmith.runs.folder import Run

    found = Run.open(run, root)
    if as_json:
        typer.echo(json_page(facts(found) | {"report": _report(found)}))
        return
    screen = console()
    _head(screen, found)
    history = RunHistory.of(found.events())
    report = _report(found)
    if history.plan:
        _plan(screen, history, report)
    _measures(screen, history, report)
    _tail(screen, found)


def _report(run: Run) -> dict[str, Any] | None:
    """The report of a finished run, or None before there is one."""
    if not run.report_path.exists():
        return None
    from tunesmith.evaluation.report.build import kept_report

    return kept_report(run)


def _head(screen: Console, run: Run) -> None:
    from tunesmith.cli.render import visible

    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created))
    screen.print(f"{visible(str(run.path))}: {run.state()}, made {made}")


def _plan(screen: Console, history: RunHistory, report: Mapping[str, Any] | None) -> None:
    """The plan; of a finished run with the time and memory it took instead of the forecast."""
    from tunesmith.cli.render import plan_facts, plan_panel, visible

    plan = history.plan if report is None else {**history.plan, "forecast": None, "took": took(report)}
    if screen.is_terminal:
        screen.print(plan_panel(plan))
        return
    for name, text in plan_facts(plan):
        screen.print(f"{name}: {visible(text)}")


def took(report: Mapping[str, Any]) -> str:
    """The time and memory that a finished run took."""
    from tunesmith.formatting import duration, size

    parts = {"prepare": "to prepare", "train": "to train", "evaluate": "to measure"}
    spans = [f"{duration(report['seconds'][part])} {words}" for part, words in parts.items()]
    return f"{', '.join(spans)}; at most {size(report['peak_memory_bytes'])} of memory"


def _measures(screen: Console, history: RunHistory, report: Mapping[str, Any] | None) -> None:
    from tunesmith.cli.render import answers_table, loss, result, sparkline
    from tunesmith.formatting import plural

    if history.losses:
        first, last = history.losses[min(history.losses)], history.losses[max(history.losses)]
        screen.print(
            f"training loss {loss(first)} {sparkline(history.smoothed())} {loss(last)}, {plural(history.step, 'step')}"
        )
    if len(history.curve) > 1:
        kept = history.report.get("kept", {}).get("step", history.step)
        aside = "" if kept == history.step else f", kept: step {kept:,}"
        screen.print(
            f"held-out loss {loss(history.curve[0])} {sparkline(history.curve)} {loss(history.curve[-1])}{aside}"
        )
    if report is not None and report["metrics"]["after"] is not None:
        screen.print(result(report))
    if history.samples:
        if len(history.samples) > MOST_ANSWERS:
            screen.print(f"{MOST_ANSWERS} of {len(history.samples):,} answers; the report has all")
        screen.print(answers_table(history.samples, width=min(screen.width, 120), most=MOST_ANSWERS))


def _tail(screen: Console, run: Run) -> None:
    """The error, if there was one, and what to do next."""
    from tunesmith.cli.render import visible
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
