"""tunesmith train, resume, track"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tunesmith.cli import options
from tunesmith.cli.options import build_recipe, named
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError, RecipeError, RunError, TunesmithError
from tunesmith.phrases import visible
from tunesmith.runs.folder import Run
from tunesmith.types import Event, JsonObject, OnProgress

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe
    from tunesmith.training.job import Watcher


def train(
    model: options.Model = None,
    data: options.Data = None,
    eval_: options.Eval = None,
    task: options.Task = None,
    method: options.MethodName = None,
    rank: options.Rank = None,
    lr: options.Rate = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    grader: options.Grader = None,
    teacher: options.Teacher = None,
    fast: options.Fast = False,
    export: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET[:KIND]", help="Export the result at the end: merged, gguf:q4_k_m."),
    ] = None,
    track: options.Track = None,
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of this run instead of runs/NAME-1a2b.")
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(min=1, metavar="WORKERS", help="Train on this number of workers of the Ray cluster; needs --out."),
    ] = None,
    root: options.Root = Path("runs"),
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Fine-tune MODEL on DATA: check the data, plan, measure, train, measure again, and write a run folder.

    tunesmith train HuggingFaceTB/SmolLM2-135M-Instruct support.jsonl --eval held-out.jsonl

    tunesmith train ./model a.jsonl b.csv:0.5 --method lora --rank 8 --epochs 2 --set optim.warmup=0.1

    tunesmith train ./model prompts.jsonl --task reinforce --grader grader.py

    tunesmith train ./model support.jsonl --track wandb --track tensorboard

    tunesmith train ./model hf://datasets/owner/name --eval 'hf://datasets/owner/name?split=test'

    tunesmith train --recipe runs/support-3f2a/recipe.yaml
    """
    words = {"task": task, "method.name": method, "export.to": export, "optim.lr": lr, "train.epochs": epochs}
    words |= {"train.rows_per_step": batch_size, "method.rank": rank, "track": track, "reinforce.grader": grader}
    words["distil.teacher"] = teacher
    wanted = build_recipe(
        "train", model, data, held_out=eval_, recipe=recipe, words=words, settings=settings, fast=fast, root=root
    )
    shown: dict[str, Any] = {"as_json": as_json, "quiet": quiet, "verbose": verbose}
    if ray is not None:
        _tune_on_ray(wanted, ray, out=out, offline=offline, shown=shown)
        return
    from tunesmith.training.job import train_run

    train_run(wanted, watch=partial(_watch, **shown), several=_launch, root=root, out=out, offline=offline)


def _tune_on_ray(recipe: Recipe, workers: int, *, out: Path | None, offline: bool, shown: JsonObject) -> None:
    from tunesmith.cli.display import run_display
    from tunesmith.sweeps.ray_engine import train_on_ray

    if out is None:
        raise RecipeError("--ray: needs --out DIR on a disk that all workers see: a group started again goes on there.")
    address = os.environ.get("RAY_ADDRESS", "auto")
    with run_display(**shown) as display:
        heard = display.listener()
        run = train_on_ray(recipe, out=out, workers=workers, listener=heard, address=address, offline=offline)
        display.done(run)


@contextmanager
def _watch(
    is_first: bool, *, as_json: bool, quiet: bool, verbose: bool, earlier: Iterable[Event] = ()
) -> Iterator[Watcher]:
    """The terminal as the watcher of a run; ranks other than the first show nothing."""
    from tunesmith.cli.display import phases, run_display
    from tunesmith.cli.export import EXPORT_PHASES, print_export, print_note
    from tunesmith.training.job import Watcher

    shown = {"as_json": as_json and is_first, "quiet": quiet or not is_first, "follows": not is_first}
    with run_display(**shown, verbose=verbose, earlier=earlier) as display:

        def export_progress() -> AbstractContextManager[OnProgress]:
            display.close()
            return phases(console(stderr=True), EXPORT_PHASES)

        yield Watcher(
            listener=display.listener,
            tracked=display.tracked,
            say=lambda text: console(stderr=True).print(visible(text), soft_wrap=True),
            done=display.done,
            export_progress=export_progress,
            export_note=print_note,
            exported=partial(print_export, as_json=as_json),
        )


def _launch(devices: int) -> NoReturn:
    """Run this command line in one process a device, and exit with their code."""
    from tunesmith.parallel.launch import launch

    screen = console(stderr=True)
    raise typer.Exit(launch(devices, sys.argv[1:], say=lambda text: screen.print(visible(text), style="bold red")))


def resume(
    run: options.RunName,
    settings: options.Settings = None,
    model: options.BaseAt = None,
    track: options.Track = None,
    root: options.Root = Path("runs"),
    offline: options.Offline = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Continue a run that was stopped, failed or killed, with the same result as if it had not been.

    tunesmith resume runs/support-3f2a

    tunesmith resume last --track mlflow    (the recipe's trackers continue by themselves; --track none: without
    any)

    tunesmith resume last --set train.tokens_per_pass=512 --set train.checkpointed_layers=30
    """
    from tunesmith.training.job import resume_run

    opened = Run.open(named(run, root), root, base=model)
    try:
        earlier = list(opened.events())
    except RunError:  # a damaged log, which training puts right or refuses
        earlier = []
    watch = partial(_watch, as_json=as_json, quiet=quiet, verbose=verbose, earlier=earlier)
    resume_run(opened, watch=watch, several=_launch, settings=settings or [], trackers=track or [], offline=offline)


POLL_S = 0.5


def track(
    run: options.RunName,
    to: Annotated[
        list[str], typer.Option("--to", metavar="TRACKER", help="tensorboard, wandb, mlflow or trackio. Repeatable.")
    ],
    follow: Annotated[bool, typer.Option("--follow", help="Keep sending until the run ends.")] = False,
    root: options.Root = Path("runs"),
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Send a run that is done or under way to an experiment tracker: what it does
    not have yet, and nothing twice.

    tunesmith track last --to mlflow

    tunesmith track runs/support-3f2a --to wandb --follow
    """
    from tunesmith.trackers.libraries import check_names
    from tunesmith.trackers.sender import read_state, tracked

    names = check_names(to)
    if not names:
        raise InputError("--to: none: names no tracker. Give tensorboard, wandb, mlflow or trackio.")
    opened, screen, failed = Run.open(named(run, root), root), console(stderr=as_json), dict[str, str]()

    def say(is_sent: bool, line: str) -> None:
        screen.print(line, soft_wrap=True)
        failed.update({} if is_sent else {line.partition(":")[0]: line})

    with tracked(names, offline=offline, say=say, wait_s=None) as begin:
        begin(opened)
        while follow and opened.state() in ("new", "running"):
            time.sleep(POLL_S)
    for name in names if as_json else ():
        json_line({"kind": "track", "tracker": name, "sent": name not in failed, **read_state(opened, name)})
    if failed:
        raise TunesmithError("\n".join(failed.values()))
