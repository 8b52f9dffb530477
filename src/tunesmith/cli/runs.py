"""tunesmith runs"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tunesmith.cli.options import Json, Root, remember_json

if TYPE_CHECKING:
    from tunesmith.run import Run

COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "stopped": "yellow"}


def runs(ctx: typer.Context, root: Root = Path("runs"), as_json: Json = False) -> None:
    """List runs, newest first: how far each came and what it gained.

    tunesmith runs --runs experiments
    """
    remember_json(ctx, as_json)
    from tunesmith import run as run_folder
    from tunesmith.cli.output import console, json_page

    rows = sorted((facts(run) for run in run_folder.runs(root)), key=lambda row: -row["created"])
    screen = console()
    if as_json:
        typer.echo(json_page(rows))
    elif not rows:
        screen.print(f"{root}: no runs yet. Start one: tunesmith train MODEL DATA")
    elif screen.is_terminal:
        screen.print(_table(rows))
    else:
        for row in rows:
            typer.echo("\t".join(_cells(row)))


def facts(run: Run) -> dict[str, Any]:
    """One run in plain values; one that cannot be read says why instead of hiding the others."""
    from tunesmith.cli.story import Story
    from tunesmith.errors import TunesmithError

    known: dict[str, Any] = {"name": run.path.name, "path": str(run.path), "created": 0.0, "state": "unreadable"}
    try:
        recipe, story = run.recipe(), Story.of(run.events())
        return known | {
            "created": run.created,
            "state": run.state(),
            "model": recipe.model,
            "task": recipe.task,
            "method": recipe.method.name,
            "step": story.step,
            "steps": story.total_steps,
            "before": story.before.get("loss"),
            "after": story.after.get("loss", story.curve[-1] if len(story.curve) > 1 else None),
            "measures": story.measures,
        }
    except TunesmithError as error:
        return known | {"problem": str(error)}


def _cells(row: dict[str, Any]) -> list[str]:
    from tunesmith.cli.scores import gist
    from tunesmith.cli.text import age, loss, visible

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
        gist(row["measures"].get("before", {}), row["measures"].get("after", {})),
        age(time.time() - row["created"]),
    ]


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, header_style="bold")
    for name in ("run", "state", "model", "task", "method"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "held-out loss", "measure", "made"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [Text(cell) for cell in _cells(row)]
        cells[1].stylize(COLOURS.get(row["state"], ""))
        table.add_row(*cells)
    return table
