"""tunesmith runs"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.options import Json, Root, remember_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunesmith.runs.folder import Run

COLUMNS = ("run", "state", "model", "task", "method", "steps", "held-out loss", "measure", "made")
DROPPED = ("made", "method", "held-out loss", "task", "model", "measure", "steps")
"""Columns that a narrow terminal has no room for, the first to go first."""
COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "stopped": "yellow"}


def runs(ctx: typer.Context, root: Root = Path("runs"), as_json: Json = False) -> None:
    """List runs, newest first, with their state and metrics.

    tunesmith runs --runs experiments
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.streams import console, json_page
    from tunesmith.runs import folder as run_folder

    rows = sorted((facts(run) for run in run_folder.runs(root)), key=lambda row: -row["created"])
    screen = console()
    if as_json:
        typer.echo(json_page(rows))
    elif not rows:
        screen.print(f"{root}: no runs yet. Start one: tunesmith train MODEL DATA")
    elif screen.is_terminal:
        _draw(screen, rows)
    else:
        typer.echo("\t".join(COLUMNS))
        for row in rows:
            typer.echo("\t".join(_cells(row)))


def facts(run: Run) -> dict[str, Any]:
    """One run in plain values; one that cannot be read says why instead of hiding the others."""
    from tunesmith.cli.history import RunHistory
    from tunesmith.errors import TunesmithError

    known: dict[str, Any] = {"name": run.path.name, "path": str(run.path), "created": 0.0, "state": "unreadable"}
    try:
        recipe, history = run.recipe(), RunHistory.of(run.events())
        return known | {
            "created": run.created,
            "state": run.state(),
            "model": recipe.model,
            "task": recipe.task,
            "method": recipe.method.name,
            "step": history.step,
            "steps": history.total_steps,
            "before": history.before.get("loss"),
            "after": history.after.get("loss", history.curve[-1] if len(history.curve) > 1 else None),
            "measures": history.measures,
        }
    except TunesmithError as error:
        return known | {"problem": str(error)}


def _cells(row: dict[str, Any]) -> list[str]:
    from tunesmith.cli.render import age, headline_metric, loss, visible

    if "problem" in row:
        return [row["name"], row["state"], visible(row["problem"]), "", "", "", "", "", ""]
    return [
        row["name"],
        row["state"],
        visible(Path(row["model"]).name),
        row["task"],
        row["method"],
        f"{row['step']}/{row['steps']}",
        f"{loss(row['before'])} → {loss(row['after'])}",
        headline_metric(row["measures"].get("before", {}), row["measures"].get("after", {})),
        age(time.time() - row["created"]),
    ]


def _draw(screen: Console, rows: list[dict[str, Any]]) -> None:
    """As many columns as fit; below them why a run cannot be read."""
    from rich.measure import Measurement

    from tunesmith.cli.render import visible

    shown = list(COLUMNS)
    anything = screen.options.update(width=100_000)
    for name in DROPPED:
        if Measurement.get(screen, anything, _table(rows, shown)).maximum <= screen.width:
            break
        shown.remove(name)
    screen.print(_table(rows, shown))
    for row in rows:
        if "problem" in row:
            screen.print(visible(f"{row['name']}: {row['problem']}"), soft_wrap=True)


def _table(rows: list[dict[str, Any]], shown: Sequence[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold")
    for name in shown:
        table.add_column(name, justify="left" if name in COLUMNS[:5] else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        texts = [row["name"], row["state"], *[""] * 7] if "problem" in row else _cells(row)
        cells = {name: Text(text) for name, text in zip(COLUMNS, texts, strict=True)}
        cells["state"].stylize(COLOURS.get(row["state"], ""))
        table.add_row(*(cells[name] for name in shown))
    return table
