"""tunesmith train"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import TASKS, Json, Offline, Quiet, Root, Settings, files, given, remember_json
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.recipe.knobs import Recipe


def train(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder, a hub id or a .gguf file.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="DATA...", help="Files of rows. [bold]a.jsonl:2[/]: each row twice an epoch."),
    ] = None,
    eval_: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="DATA", help="Held-out rows; without, 5 % of DATA are held out."),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="auto|" + "|".join(TASKS), help="What is learnt.")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="auto|lora|dora|qlora|full|peft", help="How weights change.")
    ] = None,
    export: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET[:KIND]", help="Export the result at the end: merged, gguf:q4_k_m."),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe; other options count more.")] = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of this run instead of runs/NAME-1a2b.")
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune MODEL on DATA: check the rows, plan, measure, train, measure again, and leave a run folder.

    tunesmith train HuggingFaceTB/SmolLM2-135M-Instruct support.jsonl --eval held-out.jsonl

    tunesmith train ./model a.jsonl b.csv:0.5 --method lora --set method.rank=8 --set train.epochs=2

    tunesmith train --recipe runs/support-3f2a/recipe.yaml
    """
    remember_json(ctx, as_json)
    from tunesmith.recipe import read

    explicit = {
        "model": model,
        "data.train": files(data),
        "data.eval": files(eval_),
        "task": task,
        "method.name": method,
        "export.to": export,
    }
    chosen = read.load(str(recipe) if recipe else None, [*given(explicit), *(settings or [])])
    if not chosen.model or not chosen.data.train:
        missing = "model" if not chosen.model else "data.train"
        raise InputError(f"{missing}: nothing was given. Write: tunesmith train MODEL DATA, or a --recipe that has it.")
    _tune(chosen, out=out, root=root, offline=offline, as_json=as_json, quiet=quiet)


def _tune(chosen: Recipe, *, out: Path | None, root: Path, offline: bool, as_json: bool, quiet: bool) -> None:
    from tunesmith.cli.running import watched

    with watched(as_json=as_json, quiet=quiet) as watch:
        from tunesmith import training
        from tunesmith.export.planned import check_planned

        for note in check_planned(chosen, root=root, offline=offline):
            watch.note(note)
        watch.done(training.train(chosen, root=root, out=out, offline=offline, listener=watch.listener()))
