"""tunesmith runs, runs rm, runs prune, show"""

from __future__ import annotations

import fnmatch
import operator
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json, Root, RunName, named
from tunesmith.cli.render import answers_table, print_result, print_table
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError, RunError
from tunesmith.evaluation.series import RunSeries
from tunesmith.phrases import command, did_you_mean, plural, size, visible
from tunesmith.runs import events
from tunesmith.runs.folder import Run
from tunesmith.runs.folder import runs as all_runs
from tunesmith.summaries.runs import facts, model_name, phase
from tunesmith.summaries.words import age, headline_metric, loss, took
from tunesmith.types import JsonObject, Record

if TYPE_CHECKING:
    from rich.console import Console


RUN_COLUMNS = ("run", "state", "model", "task", "method", "steps", "held-out loss", "measure", "made")
SPARE = ("made", "method", "held-out loss", "task", "model", "measure", "steps")
"""Columns that a narrow terminal has no room for, the first to go first."""


Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="FIELD=VALUE", help="Only runs of which this holds: task=chat, loss<1.7. Repeatable."
    ),
]
Names = typer.Argument(metavar="RUN...", help="Runs by name, path, or [bold]last[/].")
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
        for param in ctx.command.params:
            source = ctx.get_parameter_source(param.name or "")
            if source is not None and source.name == "COMMANDLINE":
                raise InputError(
                    f"{param.opts[0]}: write it after {ctx.invoked_subcommand}, which does not see it here."
                )
        return
    rows = select(list(map(facts, all_runs(root))), where or (), sort or "-created")
    screen = console()
    if as_json:
        json_line([{key: value for key, value in row.items() if key != "fields"} for row in rows])
    elif not rows:
        rule = f" of which {' and '.join(where)} holds" if where else " yet. Start one: tunesmith train MODEL DATA"
        screen.print(f"{root}: no runs{rule}")
    else:
        print_table(screen, RUN_COLUMNS, map(_cells, rows), spare=SPARE)
        for row in rows:
            if "problem" in row:
                words = " ".join(row["problem"].split())
                console(stderr=not screen.is_terminal).print(visible(f"{row['name']}: {words}"), soft_wrap=True)


def rm(
    names: Annotated[list[str], Names],
    yes: Yes = False,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Remove runs with everything in their folders, after asking.

    tunesmith runs rm support-3f2a support-77b0
    """
    _remove([Run.open(named(name, root), root) for name in names], verb="rm", yes=yes, as_json=as_json)


def prune(
    names: Annotated[list[str] | None, Names] = None,
    where: Where = None,
    yes: Yes = False,
    root: Root = Path("runs"),
    as_json: Json = False,
) -> None:
    """Free disk space: remove checkpoints of finished runs, and exports that can be made anew, after asking.

    tunesmith runs prune

    tunesmith runs prune --where "loss>2" --yes
    """
    if names and where:
        raise InputError(f"--where: {', '.join(names)}: runs are named already. Give names or conditions.")
    rows = [] if names else select(list(map(facts, all_runs(root))), where or (), "name")
    done = [row["path"] for row in rows if row["state"] == "done"]
    _remove([Run.open(named(name, root), root) for name in names or done], verb="prune", yes=yes, as_json=as_json)


def _remove(chosen: Sequence[Run], *, verb: str, yes: bool, as_json: bool) -> None:
    """Say what each part frees, ask, and remove them. Raises InputError where nobody can answer."""
    from tunesmith.runs.prune import removable, remove_removable

    parts, notes = removable(list({run.path.resolve(): run for run in chosen}.values()), whole=verb == "rm")
    if notes and verb == "rm":
        raise RunError("\n".join(notes))
    screen, total = console(stderr=as_json), sum(part.num_bytes for part in parts)
    names = [part.path.relative_to(part.run.path.parent) for part in parts]
    lines = [f"{name}: {size(part.num_bytes)} ({part.reason})" for name, part in zip(names, parts, strict=True)]
    for line in [*notes, *(lines or ["nothing to remove"])]:
        screen.print(visible(line), soft_wrap=True)
    words = f"Remove {size(total)} of {plural(len({part.run.path for part in parts}), 'run')}?"
    if parts and not yes and not sys.stdin.isatty():
        raise InputError(f"{words} Nobody can answer here. Pass --yes.")
    if parts and not yes and not typer.confirm(words, err=True):
        return
    for part in parts:
        remove_removable(part)
        for what in ("output", "lock") if verb == "rm" else ():  # of a process that pages started
            part.run.path.with_name(f".{part.run.path.name}.{what}").unlink(missing_ok=True)
    if as_json:
        removed = [{"path": str(part.path), "bytes": part.num_bytes} for part in parts]
        json_line({"kind": verb, "removed": removed, "bytes": total})
    elif parts:
        screen.print(f"freed {size(total)}")


def _cells(row: JsonObject) -> list[str]:
    if "problem" in row:
        return [row["name"], row["state"], *[""] * (len(RUN_COLUMNS) - 2)]
    return [
        row["name"],
        row["state"],
        visible(model_name(Path(row["model"]))),
        row["task"],
        row["method"],
        f"{row['step']}/{row['steps']}",
        f"{loss(row['before'])} → {loss(row['after'])}",
        headline_metric(row["measures"]["before"], row["measures"]["after"]),
        age(time.time() - row["created"]),
    ]


_CONDITION = re.compile(r"\s*([\w.]+)\s*(<=|>=|!=|==?|<|>)\s*(.*?)\s*", re.DOTALL)
_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "!=": operator.ne, "=": operator.eq,
    "==": operator.eq,
}  # fmt: skip


def select(rows: Sequence[JsonObject], where: Iterable[str], sort: str) -> list[JsonObject]:
    """The runs of which every condition holds, in the order of a field; each row has `fields`.

    `sort`: a field, with a minus in front from large to small; runs without it come last.
    Raises InputError for a condition that cannot be read, or a field that no run has.
    """
    known = sorted({name for row in rows for name in row["fields"]})
    for text in where:
        match = _CONDITION.fullmatch(text)
        if match is None:
            form = 'FIELD=VALUE, such as "task=chat", "loss<1.7", "model=*SmolLM*"'
            raise InputError(f"--where {text}: not of the form {form}.")
        _refuse_unknown(f"--where {text}", match[1], known)
        rows = [row for row in rows if _holds(f"--where {text}", row["fields"].get(match[1]), match[2], match[3])]
    field = sort.removeprefix("-")
    _refuse_unknown(f"--sort {sort}", field, known)
    with_field = [row for row in rows if row["fields"].get(field) is not None]
    are_numbers = all(isinstance(row["fields"][field], int | float) for row in with_field)
    with_field.sort(
        key=lambda row: row["fields"][field] if are_numbers else str(row["fields"][field]), reverse=sort[:1] == "-"
    )
    return [*with_field, *(row for row in rows if row["fields"].get(field) is None)]


def _refuse_unknown(place: str, name: str, known: Sequence[str]) -> None:
    if known and name not in known:
        ways = "`tunesmith show RUN --json` lists metrics (before.NAME: of the base) and options, such as optim.lr."
        raise InputError(f"{place}: no run has a field {name}.{did_you_mean(name, known)} {ways}")


def _holds(place: str, found: Any, sign: str, value: str) -> bool:
    """Whether `found sign value` holds, never without a field. Raises InputError for text compared by size."""
    if found is None:
        return False
    try:
        if isinstance(found, int | float) and not isinstance(found, bool):
            return _OPERATORS[sign](found, float(value))
    except ValueError:
        raise InputError(f"{place}: it is a number, such as {found:g}.") from None
    if sign in ("<", "<=", ">", ">="):
        raise InputError(f"{place}: it is text, such as {found!r}: use = or !=, and * for any text.")
    shown = str(found).lower() if isinstance(found, bool) else str(found)
    return fnmatch.fnmatchcase(shown, value) == (sign != "!=")


MOST_RUN_ANSWERS = 16
"""Shown."""


def show(run: RunName = "last", root: Root = Path("runs"), as_json: Json = False) -> None:
    """Show a run: plan, loss curves, metrics and answers.

    tunesmith show last
    """
    opened = Run.open(run, root)
    if as_json:
        json_line(facts(opened) | {"report": _report(opened)})
        return
    screen = console()
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(opened.created))
    state, newest = opened.state(), events.newest(opened.events_path)
    doing = phase(opened, newest.time if newest else 0.0) if state == "running" else ""
    screen.print(f"{visible(str(opened.path))}: {state}{f' ({visible(doing)})' if doing else ''}, made {made}")
    series = RunSeries.of(opened.events())
    report = _report(opened)
    if series.plan:
        from tunesmith.cli.display import print_plan

        spent = {} if report is None else {"forecast": None, "took": took(report)}
        print_plan(screen, {**series.plan, **spent})
    _measures(screen, series, report)
    _tail(screen, opened)


def _report(run: Run) -> JsonObject | None:
    """The report of a finished run, or None before there is one."""
    if not run.report_path.exists():
        return None
    from tunesmith.evaluation.report.values import kept_report

    return kept_report(run)


def _measures(screen: Console, series: RunSeries, report: Record | None) -> None:
    if series.steps:
        values = [step.value for step in series.steps.values()]
        screen.print(f"training {series.aim} {training_curve(values, series.step)}")
    if len(series.curve) == 1:
        screen.print(f"held-out {series.aim} of the untouched model {loss(series.curve[0])}")
    elif series.curve:
        kept_step, last = series.report.get("kept", {}).get("step", series.step), series.curve[-1]
        at_step, aside = series.held_out(kept_step), ""
        if kept_step != series.step:
            aside = f" at step {kept_step:,}, which was kept; {loss(last)} at the end"
        screen.print(f"held-out {series.aim} {loss(series.curve[0])} → {loss(at_step.get(kept_step, last))}{aside}")
    print_result(screen, report or {})
    if series.samples:
        if len(series.samples) > MOST_RUN_ANSWERS:
            screen.print(f"{MOST_RUN_ANSWERS} of {len(series.samples):,} answers; the report has all")
        screen.print(answers_table(series.samples, width=min(screen.width, 120), most=MOST_RUN_ANSWERS))


def training_curve(values: Sequence[float], steps: int) -> str:
    """The means of the first and of the last values of a run, which have no step in common, and the number of
    all its steps."""
    if len(values) == 1:
        return f"{loss(values[0])} in {plural(steps, 'step')}"
    num = min(max(10, len(values) // 10), len(values) // 2)  # one step may have a single row
    means = "the first and the last" if num == 1 else f"means of the first and the last {num}"
    return f"{loss(fmean(values[:num]))} → {loss(fmean(values[-num:]))}: {means} of {plural(steps, 'step')}"


def _tail(screen: Console, run: Run) -> None:
    """The error, if there was one, and what to do next."""
    last = events.newest(run.events_path)
    if last is not None and last.kind == "failed":
        screen.print(f"failed after step {last.step}: {visible(str(last.values.get('message', '')))}")
    state = run.state()
    if state in ("stopped", "interrupted", "failed"):
        screen.print(f"continue with: {command('resume', run.path)}", soft_wrap=True)
    elif state == "done":
        kind = "adapter" if run.adapter_path.exists() else "model"
        screen.print(f"{kind} in {run.path / kind}, report in {run.path / 'report.html'}")
