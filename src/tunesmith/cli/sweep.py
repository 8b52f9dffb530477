"""tunesmith sweep"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import Json, Offline, Quiet, Root
from tunesmith.cli.render import print_table
from tunesmith.cli.signals import stopping_on_signals
from tunesmith.cli.streams import console, json_line
from tunesmith.environment.process import refuse_ranks
from tunesmith.errors import Stopped
from tunesmith.evaluation.metrics import info_of
from tunesmith.phrases import command, plural, visible
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.sweeps.sweep import Outcome, Sweep, Watch
    from tunesmith.sweeps.trial import TrialRunner

CHOSEN = (
    "The best of several trials looks a little better on the rows it was chosen by than it is: measure it on "
    "rows that no trial was measured on."
)
SWEEP_COLUMNS = ("trial", "options", "measure", "steps", "state")


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID", help="File with base, grid and, if wanted, asha.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the sweep's folder and of its runs (default: GRID's).")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="local|auto|HOST:PORT", help="Trials at once on Ray (extra ray); docs/guide/sweep.md."),
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    r"""Train a run for each combination of options in GRID, stop the poor ones early, and say which is best.

    tunesmith sweep lr.yaml

    tunesmith sweep lr.yaml --ray local

    with, in lr.yaml, base: {model: ./model, data: {train: \[a.jsonl]}} and grid: {optim.lr: [1e-4, 3e-4]}

    The same command goes on with a sweep that was stopped or killed.
    """
    refuse_ranks(os.environ)
    from tunesmith.sweeps.grid import read_grid
    from tunesmith.sweeps.sweep import Sweep

    trials = Sweep(read_grid(grid, name), root, offline)
    screen = console(stderr=as_json)
    if not quiet:
        screen.print(f"{plural(len(trials.grid.trials), 'trial')} of {', '.join(trials.grid.keys)}")
    with trials.opened():
        with (
            _watching(screen, quiet=quiet) as watch,
            stopping_on_signals(
                has_begun=lambda: True,
                say=watch.say,
                words="stopping: trials at work save a checkpoint. Once more to leave at once.",
            ) as watch.should_stop,
        ):
            try:
                with _engine(trials, ray) as engine:
                    trials.run(engine, watch)
            except Stopped as stopped:
                words = ["sweep", str(grid), *(["--name", name] if name else []), "--runs", str(root)]
                words += ["--ray", ray] if ray else []
                raise Stopped(f"{stopped}; go on with: {command(*words)}") from None
        _show(trials, as_json=as_json, quiet=quiet)


@contextmanager
def _engine(found: Sweep, ray: str | None) -> Iterator[TrialRunner]:
    from tunesmith.sweeps.trial import OneByOne

    if ray is None:
        yield OneByOne()
        return
    from tunesmith.parallel.cluster import connected, needs_of
    from tunesmith.sweeps.ray_engine import RayTasks

    with connected(ray) as ray_module:
        yield RayTasks(ray_module, needs_of(found.grid.trials[0].recipe, ray_module))


@contextmanager
def _watching(screen: Console, *, quiet: bool) -> Iterator[Watch]:
    from tunesmith.sweeps.sweep import Watch

    if quiet:
        yield Watch()
    elif screen.is_terminal:
        with screen.status("") as status:
            yield Watch(lambda text: screen.print(visible(text)), lambda text: status.update(visible(text)))
    else:
        yield Watch(lambda text: screen.print(visible(text), soft_wrap=True))


def _show(found: Sweep, *, as_json: bool, quiet: bool) -> None:
    """The table, and the best run with what to do next."""
    from tunesmith.sweeps.sweep import best_of, options_text

    outcomes, screen = found.outcomes(), console()
    if as_json:
        name = outcomes[0].trial.name if outcomes[0].state == "done" else None
        values = {"kind": "sweep", "metric": found.grid.metric, "best": name}
        json_line({**values, "trials": [_values(found, outcome) for outcome in outcomes]})
        best_of(outcomes)
        return
    if not quiet:
        heads = [info_of(found.grid.metric).label if head == "measure" else head for head in SWEEP_COLUMNS]
        print_table(screen, heads, [_cells(outcome, found.grid.metric) for outcome in outcomes])
    best = best_of(outcomes)
    run = found.root / best.trial.name
    if quiet:
        screen.print(str(run))
        return
    screen.print(visible(f"\nThe best is {run} ({options_text(best.trial.options)}). Next:\n"))
    second = [found.root / outcome.trial.name for outcome in outcomes[1:2] if outcome.state == "done"]
    grader = best.trial.recipe.reinforce.grader
    measure = ("eval", run, "FILE") if grader is None else ("grade", "FILE", "--grader", grader, "--model", run)
    for words in (("show", run), measure, *(("compare", other, run) for other in second)):
        screen.print(f"  {command(*words)}", soft_wrap=True)
    screen.print(f"\n{CHOSEN}")


def _values(found: Sweep, outcome: Outcome) -> JsonObject:
    return {
        "name": outcome.trial.name,
        "run": str(found.root / outcome.trial.name),
        "options": dict(outcome.trial.options),
        "state": outcome.state,
        "reason": outcome.reason,
        "step": outcome.step,
        "steps": outcome.total,
        "measure": None if outcome.measure is None else dict(outcome.measure),
    }


def _cells(outcome: Outcome, metric: str) -> list[str]:
    from tunesmith.sweeps.sweep import options_text

    measured = "–" if outcome.measure is None else info_of(metric).whole(outcome.measure)
    state = f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
    steps = f"{outcome.step}/{outcome.total}" if outcome.total else "–"
    return [outcome.trial.name, options_text(outcome.trial.options), measured, steps, state]
