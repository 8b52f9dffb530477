"""tunesmith train, resume, track"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import options
from tunesmith.cli.options import build_recipe, named
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError, RecipeError, RunError, TunesmithError
from tunesmith.phrases import plural, visible
from tunesmith.runs.folder import Run

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


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
        typer.Option(min=1, metavar="WORKERS", help="Train on so many workers of this Ray cluster; needs --out."),
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

    tunesmith train ./model support.jsonl --track wandb --track tensorboard

    tunesmith train ./model hf://datasets/owner/name --eval 'hf://datasets/owner/name?split=test'

    tunesmith train --recipe runs/support-3f2a/recipe.yaml
    """
    words = {"task": task, "method.name": method, "export.to": export, "optim.lr": lr, "train.epochs": epochs}
    words |= {"train.rows_per_step": batch_size, "method.rank": rank, "track": track}
    how: dict[str, Any] = {"held_out": eval_, "recipe": recipe, "settings": settings, "fast": fast, "root": root}
    found = build_recipe("train", model, data, words=words, **how)
    shown: dict[str, Any] = {"as_json": as_json, "quiet": quiet, "verbose": verbose}
    if ray is not None:
        _tune_on_ray(found, ray, out=out, offline=offline, shown=shown)
        return
    _tune(found, out=out, root=root, offline=offline, shown=shown)


def _tune_on_ray(recipe: Recipe, workers: int, *, out: Path | None, offline: bool, shown: dict[str, Any]) -> None:
    from tunesmith.cli.display import run_display
    from tunesmith.sweeps.ray_engine import train_on_ray

    if out is None:
        raise RecipeError("--ray: needs --out DIR on a disk that all workers see: a group started again goes on there.")
    address = os.environ.get("RAY_ADDRESS", "auto")
    with run_display(**shown) as display:
        heard = display.listener()
        run = train_on_ray(recipe, out=out, workers=workers, listener=heard, address=address, offline=offline)
        display.done(run)


def _tune(recipe: Recipe, *, out: Path | None, root: Path, offline: bool, shown: dict[str, Any]) -> None:
    from tunesmith.cli.display import run_display
    from tunesmith.cli.export import make_planned
    from tunesmith.parallel.own_card import take_card
    from tunesmith.parallel.world import place_of
    from tunesmith.trackers.sender import tracked

    launch_ranks(recipe)
    place = place_of(os.environ)
    take_card(place, recipe.device, os.environ)  # before an import can list the cards
    first = place.rank == 0
    how = shown if first else {"as_json": False, "quiet": True, "follows": True}
    with (
        run_display(**how) as display,
        tracked(recipe.track if first else (), offline=offline, say=display.tracked) as on_run,
    ):
        from tunesmith.training import trainer as training

        if recipe.export.to and first:
            from tunesmith.export.export_run import refuse_planned

            refuse_planned(recipe, offline=offline)
        run = training.train(recipe, root=root, out=out, offline=offline, listener=display.listener(on_run))
        if first:
            display.done(run)
            make_planned(run, as_json=shown["as_json"])


def launch_ranks(recipe: Recipe) -> None:
    """Run this command line in one process a device if there are several, and exit with their code."""
    from tunesmith.parallel.launch import devices_of, launch

    devices = devices_of(recipe)
    if devices > 1:
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

    tunesmith resume last --track mlflow    (those of the recipe continue by themselves; --track none: without any)

    tunesmith resume last --set train.tokens_per_pass=512 --set train.checkpointed_layers=30
    """
    from tunesmith.cli.display import run_display
    from tunesmith.cli.export import make_planned
    from tunesmith.parallel.own_card import take_card
    from tunesmith.parallel.world import place_of
    from tunesmith.recipe import load
    from tunesmith.trackers.sender import tracked

    found = Run.open(named(run, root), root, base=model)
    is_alone = place_of(os.environ).size == 1  # ranks would all make the same exports
    if is_alone and found.state() == "done" and (num := make_planned(found, as_json=as_json)):
        words = f"{found.path}: it was done except for {plural(num, 'export')}, made now"
        options_given = {"--track (see `tunesmith track`)": track, "--set": settings}
        unused = " and ".join(option for option, given in options_given.items() if given)
        words += f". {unused} had no effect" if unused else ""
        console(stderr=True).print(visible(words), soft_wrap=True)
        return
    try:
        earlier = list(found.events())
    except RunError:  # a damaged log, which training.resume puts right or refuses
        earlier = []
    recipe = load.load(str(found.recipe_path), settings or [], of_run=True)
    alone = recipe.model_copy(update={"devices": 1}) if recipe.devices == "auto" else recipe  # of an earlier version
    launch_ranks(alone)
    place = place_of(os.environ)
    take_card(place, recipe.device, os.environ)
    first = place.rank == 0
    trackers, of_recipe = (track or [], found.recipe().track) if first else ([], ())
    shown: dict[str, Any] = {"as_json": as_json and first, "quiet": quiet or not first, "follows": not first}
    with (
        run_display(**shown, verbose=verbose, earlier=earlier) as display,
        tracked(trackers, offline=offline, say=display.tracked, optional=of_recipe) as on_run,
    ):
        from tunesmith.training import trainer as training

        done = training.resume(found, settings=settings or [], offline=offline, listener=display.listener(on_run))
        if first:
            display.done(done)
            make_planned(done, as_json=as_json)


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
    """Send a run that is done or under way to an experiment tracker: what it does not have yet, and nothing twice.

    tunesmith track last --to mlflow

    tunesmith track runs/support-3f2a --to wandb --follow
    """
    from tunesmith.trackers.libraries import check_names
    from tunesmith.trackers.sender import read_state, tracked

    names = check_names(to)
    if not names:
        raise InputError("--to: none: names no tracker. Give tensorboard, wandb, mlflow or trackio.")
    found, screen, failed = Run.open(named(run, root), root), console(stderr=as_json), dict[str, str]()

    def say(is_sent: bool, line: str) -> None:
        screen.print(line, soft_wrap=True)
        failed.update({} if is_sent else {line.partition(":")[0]: line})

    with tracked(names, offline=offline, say=say, wait_s=None) as begin:
        begin(found)
        while follow and found.state() in ("new", "running"):
            time.sleep(POLL_S)
    for name in names if as_json else ():
        json_line({"kind": "track", "tracker": name, "sent": name not in failed, **read_state(found, name)})
    if failed:
        raise TunesmithError("\n".join(failed.values()))
