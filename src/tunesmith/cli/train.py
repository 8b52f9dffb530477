"""tunesmith train"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import (
    BatchSize,
    Data,
    Epochs,
    Eval,
    Fast,
    Json,
    MethodName,
    Model,
    Offline,
    Quiet,
    Rank,
    Rate,
    RecipeFile,
    Root,
    Settings,
    Task,
    Track,
    build_recipe,
    remember_json,
)
from tunesmith.cli.render import visible

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


def train(
    ctx: typer.Context,
    model: Model = None,
    data: Data = None,
    eval_: Eval = None,
    task: Task = None,
    method: MethodName = None,
    rank: Rank = None,
    lr: Rate = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    fast: Fast = False,
    export: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET[:KIND]", help="Export the result at the end: merged, gguf:q4_k_m."),
    ] = None,
    track: Track = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of this run instead of runs/NAME-1a2b.")
    ] = None,
    ray: Annotated[
        int | None,
        typer.Option(min=1, metavar="WORKERS", help="Train on so many workers of this Ray cluster; needs --out."),
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune MODEL on DATA: check the data, plan, measure, train, measure again, and write a run folder.

    tunesmith train HuggingFaceTB/SmolLM2-135M-Instruct support.jsonl --eval held-out.jsonl

    tunesmith train ./model a.jsonl b.csv:0.5 --method lora --rank 8 --epochs 2 --set optim.warmup=0.1

    tunesmith train ./model support.jsonl --track wandb --track tensorboard

    tunesmith train ./model hf://datasets/owner/name --eval 'hf://datasets/owner/name?split=test'

    tunesmith train --recipe runs/support-3f2a/recipe.yaml
    """
    remember_json(ctx, as_json)
    words = {"task": task, "method.name": method, "export.to": export, "optim.lr": lr, "train.epochs": epochs}
    words |= {"train.rows_per_step": batch_size, "method.rank": rank, "track": track}
    found = build_recipe("train", model, data, held_out=eval_, recipe=recipe, words=words, settings=settings, fast=fast)
    if ray is not None:
        _tune_on_ray(found, ray, out=out, offline=offline, as_json=as_json, quiet=quiet)
        return
    _tune(found, out=out, root=root, offline=offline, as_json=as_json, quiet=quiet)


def _tune_on_ray(recipe: Recipe, workers: int, *, out: Path | None, offline: bool, as_json: bool, quiet: bool) -> None:
    from tunesmith.cli.display import run_display
    from tunesmith.errors import RecipeError
    from tunesmith.sweeps.ray_engine import train_on_ray

    if out is None:
        raise RecipeError("--ray: needs --out DIR on a disk that all workers see: a group started again goes on there.")
    address = os.environ.get("RAY_ADDRESS", "auto")
    with run_display(as_json=as_json, quiet=quiet) as display:
        heard = display.listener()
        run = train_on_ray(recipe, out=out, workers=workers, listener=heard, address=address, offline=offline)
        display.done(run)


def _tune(recipe: Recipe, *, out: Path | None, root: Path, offline: bool, as_json: bool, quiet: bool) -> None:
    from tunesmith.cli.display import run_display
    from tunesmith.cli.export import make_planned
    from tunesmith.parallel.world import place_of
    from tunesmith.tracking.sender import tracked

    launch_ranks(recipe)
    first = place_of(os.environ).rank == 0
    with (
        run_display(as_json=as_json and first, quiet=quiet or not first, follows=not first) as display,
        tracked(recipe.track if first else (), offline=offline, say=display.tracked) as on_run,
    ):
        from tunesmith.training import trainer as training

        if recipe.export.to and first:
            from tunesmith.export.export_run import check_planned

            for note in check_planned(recipe, root=root, offline=offline):
                display.note(note)
        run = training.train(recipe, root=root, out=out, offline=offline, listener=display.listener(on_run))
        if first:
            display.done(run)
            make_planned(run, as_json=as_json)


def launch_ranks(recipe: Recipe) -> None:
    """Run this command line in one process a device if there are several, and exit with their code."""
    from tunesmith.cli.streams import console
    from tunesmith.parallel.launch import devices_of, launch

    devices = devices_of(recipe)
    if devices > 1:
        screen = console(stderr=True)
        raise typer.Exit(launch(devices, sys.argv[1:], say=lambda text: screen.print(visible(text), style="bold red")))
