"""tunesmith runs, runs rm, runs prune"""

from __future__ import annotations

import difflib
import fnmatch
import operator
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json, Root, remember_json
from tunesmith.errors import InputError
from tunesmith.formatting import listed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunesmith.runs.folder import Run
    from tunesmith.runs.prune import Prunable


COLUMNS = ("run", "state", "model", "task", "method", "steps", "held-out loss", "measure", "made")
DROPPED = ("made", "method", "held-out loss", "task", "model", "measure", "steps")
"""Columns that a narrow terminal has no room for, the first to go first."""
COLOURS = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "stopped": "yellow"}


Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="FIELD=VALUE", help="Only runs of which this holds: task=chat, loss<1.7. Repeatable."
    ),
]
Names = Annotated[list[str] | None, typer.Argument(metavar="RUN...", help="Runs by name, path, or [bold]last[/].")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def runs(
    ctx: typer.Context,
    where: Where = None,
    sort: Annotated[
        str | None,
        typer.Option("--sort", metavar="FIELD", help="Order; -FIELD: from large to small (default: -created)."),
    ] = None,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs, newest first, with their state and metrics.

    tunesmith runs --where task=chat --where "loss<1.7" --sort loss

    tunesmith runs rm support-3f2a

    tunesmith runs prune
    """
    if ctx.invoked_subcommand is not None:
        return
    remember_json(ctx, as_json)
    from tunesmith.cli.streams import console, json_page

    rows = _selected(root, where, sort or "-created")
    screen = console()
    if as_json:
        typer.echo(json_page(rows))
    elif not rows:
        rule = f" of which {' and '.join(where)} holds" if where else " yet. Start one: tunesmith train MODEL DATA"
        screen.print(f"{root}: no runs{rule}")
    elif screen.is_terminal:
        _draw(screen, rows)
    else:
        typer.echo("\t".join(COLUMNS))
        for row in rows:
            typer.echo("\t".join(_cells(row)))


def rm(
    ctx: typer.Context, names: Names = None, yes: Yes = False, root: Root = Path("runs"), as_json: Json = False
) -> None:
    """Remove runs with everything in their folders, after asking.

    tunesmith runs rm support-3f2a support-77b0
    """
    remember_json(ctx, as_json)
    from tunesmith.errors import InputError
    from tunesmith.runs import prune as removal
    from tunesmith.runs.folder import Run

    if not names:
        raise InputError("RUN: nothing was given. Write: tunesmith runs rm RUN, or tunesmith runs to list them.")
    chosen = list({run.path.resolve(): run for run in (Run.open(name, root) for name in names)}.values())
    removal.refuse_used(chosen)
    lines = [(run, [removal.Prunable(run.path, run.state(), removal.freed_bytes(run.path))]) for run in chosen]
    if _agreed(lines, yes=yes, as_json=as_json, verb="Remove"):
        for run in chosen:
            removal.remove_run(run)
        _done("rm", lines, as_json=as_json)


def prune(
    ctx: typer.Context,
    names: Names = None,
    where: Where = None,
    yes: Yes = False,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Free disk space: remove checkpoints of finished runs, and exports that can be made anew, after asking.

    tunesmith runs prune

    tunesmith runs prune --where "loss>2" --yes
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.render import visible
    from tunesmith.cli.streams import console
    from tunesmith.runs import prune as removal
    from tunesmith.runs.folder import Run

    if names:
        chosen = list({run.path.resolve(): run for run in (Run.open(name, root) for name in names)}.values())
    else:
        rows = _selected(root, where, "name")
        chosen = [Run(Path(row["path"])) for row in rows if row["state"] == "done"]
    screen, lines = console(stderr=as_json), []
    for run in chosen:
        parts, kept = removal.prunable(run)
        lines.append((run, parts))
        for reason in kept:
            screen.print(visible(f"{run.path.name}: {reason}"), soft_wrap=True)
    lines = [(run, parts) for run, parts in lines if parts]
    if _agreed(lines, yes=yes, as_json=as_json, verb="Prune"):
        for run, parts in lines:
            removal.remove_parts(run, parts)
        _done("prune", lines, as_json=as_json)


def _agreed(lines: Sequence[tuple[Run, Sequence[Prunable]]], *, yes: bool, as_json: bool, verb: str) -> bool:
    """Say what each run would free, and ask. Raises InputError where nobody can answer."""
    from tunesmith.cli.render import visible
    from tunesmith.cli.streams import console
    from tunesmith.errors import InputError
    from tunesmith.formatting import plural, size

    screen = console(stderr=as_json)
    if not lines:
        screen.print("nothing to remove")
        if as_json:
            _done(verb.lower(), (), as_json=True)
        return False
    for run, parts in lines:
        for part in parts:
            where = "" if part.path == run.path else f"/{part.path.relative_to(run.path)}"
            screen.print(visible(f"{run.path.name}{where}: {size(part.num_bytes)} ({part.reason})"), soft_wrap=True)
    words = f"{verb} {plural(len(lines), 'run')}, {size(_sum(lines))}?"
    if yes:
        return True
    if not sys.stdin.isatty():
        raise InputError(f"{words} Nobody can answer here. Pass --yes.")
    return typer.confirm(words, err=True)


def _done(kind: str, lines: Sequence[tuple[Run, Sequence[Prunable]]], *, as_json: bool) -> None:
    from tunesmith.cli.streams import console, json_line
    from tunesmith.formatting import size

    if as_json:
        removed = [{"path": str(part.path), "bytes": part.num_bytes} for _, parts in lines for part in parts]
        json_line({"kind": kind, "removed": removed, "bytes": _sum(lines)})
    else:
        console().print(f"freed {size(_sum(lines))}")


def _sum(lines: Sequence[tuple[Run, Sequence[Prunable]]]) -> int:
    return sum(part.num_bytes for _, parts in lines for part in parts)


def _selected(root: Path, where: Sequence[str] | None, sort: str | None) -> list[dict[str, Any]]:
    """The facts of runs, filtered and sorted."""
    from tunesmith.runs import folder as run_folder

    rows = [facts(run) for run in run_folder.runs(root)]
    chosen = select(rows, where or (), sort)
    return [{key: value for key, value in rows[i].items() if key != "fields"} for i in chosen]


def facts(run: Run) -> dict[str, Any]:
    """One run in plain values; one that cannot be read says why instead of hiding the others.

    `fields`: what it can be filtered and sorted by.
    """
    from tunesmith.cli.history import RunHistory
    from tunesmith.errors import TunesmithError
    from tunesmith.recipe.docs import flat

    known: dict[str, Any] = {"name": run.path.name, "path": str(run.path), "created": 0.0, "state": "unreadable"}
    try:
        recipe, history = run.recipe(), RunHistory.of(run.events())
        found = known | {
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
        return known | {"problem": str(error), "fields": known}
    after = {key: interval["value"] for key, interval in history.measures.get("after", {}).items()}
    before = {f"before.{key}": interval["value"] for key, interval in history.measures.get("before", {}).items()}
    plain = {key: found[key] for key in ("name", "state", "model", "task", "method", "step", "steps", "created")}
    return found | {"fields": {**flat(recipe.model_dump()), **before, "loss": found["after"], **after, **plain}}


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


_CONDITION = re.compile(r"\s*(?P<field>[\w.]+)\s*(?P<operator><=|>=|!=|==|=|<|>)\s*(?P<value>.*?)\s*", re.DOTALL)
_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
EXAMPLE = '--where "task=chat", --where "loss<1.7", --where "model=*SmolLM*"'
PLAIN = ("name", "state", "model", "task", "method", "step", "steps", "created")
"""Fields of every run. Its metrics (`loss`, before training `before.loss`) and the options of its recipe are others."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One `FIELD OPERATOR VALUE`."""

    text: str
    field: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Condition:
        """Raises InputError for text of another form."""
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise InputError(f"--where {text}: not of the form FIELD=VALUE. Such as: {EXAMPLE}.")
        return cls(text, match["field"], match["operator"].replace("==", "="), match["value"])

    def holds(self, fields: Mapping[str, Any]) -> bool:
        """Whether it is true of a run; never of one without the field.

        Raises InputError where a number is compared with text, or text by size.
        """
        found = fields.get(self.field)
        if found is None:
            return False
        if isinstance(found, bool) or not isinstance(found, int | float):
            return self._of_text(str(found).lower() if isinstance(found, bool) else str(found))
        try:
            value = float(self.value)
        except ValueError:
            raise InputError(f"--where {self.text}: {self.field} is a number, such as {found:g}.") from None
        if self.operator in _ORDERS:
            return _ORDERS[self.operator](found, value)
        return (found == value) == (self.operator == "=")

    def _of_text(self, found: str) -> bool:
        if self.operator in _ORDERS:
            raise InputError(
                f"--where {self.text}: {self.field} is text, such as {found!r}: use = or !=, and * for any text."
            )
        return fnmatch.fnmatchcase(found, self.value) == (self.operator == "=")


def select(rows: Sequence[Mapping[str, Any]], where: Iterable[str], sort: str | None) -> list[int]:
    """The indices of the runs of which every condition holds, in the order of a field; each row has `fields`.

    `sort`: a field, with a minus in front from large to small; runs without it come last.
    Raises InputError for a condition that cannot be read, or a field that no run has.
    """
    if not rows:
        return []
    known = {*PLAIN, *(name for row in rows for name in row["fields"])}
    conditions = [_as_known(Condition.parse(text), known) for text in where]
    for condition in conditions:
        _refuse_unknown(f"--where {condition.text}", condition.field, known)
    chosen = [i for i, row in enumerate(rows) if all(one.holds(row["fields"]) for one in conditions)]
    if sort is None:
        return chosen
    field = sort.removeprefix("-")
    _refuse_unknown(f"--sort {sort}", field, known)
    values = {i: rows[i]["fields"].get(field) for i in chosen}
    has_value = [i for i in chosen if values[i] is not None]
    are_numbers = all(isinstance(values[i], int | float) for i in has_value)
    has_value.sort(key=lambda i: values[i] if are_numbers else str(values[i]), reverse=sort.startswith("-"))
    return [*has_value, *(i for i in chosen if values[i] is None)]


def _as_known(condition: Condition, known: set[str]) -> Condition:
    """The condition on our own name of a metric that was given another tool's name, such as eval_loss."""
    ours = condition.field.removeprefix("eval_")
    return condition if condition.field in known or ours not in known else replace(condition, field=ours)


def _refuse_unknown(place: str, field: str, known: set[str]) -> None:
    if field in known:
        return
    near = difflib.get_close_matches(field, sorted(known), n=2)
    metrics = sorted(name.removeprefix("before.") for name in known if name.startswith("before."))
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    such = listed(metrics or ["loss"])
    raise InputError(
        f"{place}: no run has a field {field}.{hint} There are: {', '.join(PLAIN)}; metrics such as "
        f"{such} (before.loss: before training); and options of the recipe, such as optim.lr."
    )
