"""tunesmith plan"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Rank,
    Rate,
    RecipeFile,
    Root,
    Settings,
    Task,
    build_recipe,
    remember_json,
)
from tunesmith.environment import refuse_ranks
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.recipe.schema import Recipe


def plan(
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
    recipe: RecipeFile = None,
    settings: Settings = None,
    device: Annotated[
        str | None, typer.Option(metavar="H100-80G|24G|8xH100|...", help="Plan for cards that are not here.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Load the model in a process of its own and measure, too.")
    ] = True,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what `train` would do with MODEL and DATA and what it would need; then try its heaviest step.

    tunesmith plan ./model support.jsonl

    tunesmith plan ./model support.jsonl --method full --device 24G
    """
    remember_json(ctx, as_json)
    refuse_ranks(os.environ)
    # A plan says what does not fit, and what would.
    words = {"task": task, "method.name": method, "optim.lr": lr, "train.epochs": epochs}
    words |= {"train.rows_per_step": batch_size, "method.rank": rank}
    settings = [*(settings or []), "memory=warn"]
    found = build_recipe("plan", model, data, held_out=eval_, recipe=recipe, words=words, settings=settings, fast=fast)

    from tunesmith.cli.streams import console, json_line

    values, fits = _resolve(found, root, offline=offline, device=device, probe=probe)
    values.get("given", {}).pop("memory", None)  # it was set above, by nobody
    if as_json:
        json_line({"kind": "plan", **values})
    else:
        _draw(console(), values)
    if not fits:
        raise typer.Exit(InputError.exit_code)


def _resolve(
    recipe: Recipe, root: Path, *, offline: bool, device: str | None, probe: bool
) -> tuple[dict[str, Any], bool]:
    from tunesmith.cli.display import phases
    from tunesmith.cli.streams import console
    from tunesmith.parallel.launch import devices_of

    with phases(console(stderr=True)) as tick:
        from tunesmith.planning.devices import named_group
        from tunesmith.training.resolve import resolve_run
        from tunesmith.training.summary import resolved_values

        card, devices = named_group(device) if device else (None, devices_of(recipe))
        if (recipe.devices, devices) != ("auto", 1):  # else the plan would say that it was given
            recipe = recipe.model_copy(update={"devices": devices})
        resolved = resolve_run(recipe, root=root, offline=offline, on_progress=tick, device=card)
        values, fits = resolved_values(resolved), resolved.forecast is None or resolved.forecast.fits
        if small := _small_disk(resolved.forecast, root):
            values["warnings"].append(small)
            fits = False
        values["probe"] = None
        several = "several devices are tried by `train` alone" if devices > 1 else ""
        if probe and (why := f"{device} is not here" if card else several or _why_not(resolved, fits=fits)):
            values["warnings"].append(f"not probed: {why}")
        elif probe:
            values["probe"] = _probe(resolved, values, root, offline=offline, tick=tick)
    return values, fits


def _small_disk(forecast: Any, root: Path) -> str:
    """A warning if the disk has less room than the run takes; empty: it has enough."""
    from tunesmith.formatting import size
    from tunesmith.training.setup import free_bytes

    needed = forecast.disk.checkpoints + forecast.disk.result if forecast else 0
    free = free_bytes(root)
    if free is None or needed <= free:
        return ""
    return f"{root}: the disk has {size(free)} free, but this run needs {size(needed)}: train will refuse it"


def _why_not(resolved: Any, *, fits: bool) -> str:
    """Why a plan for this machine is not tried; empty: it is."""
    from tunesmith.formatting import size
    from tunesmith.models.folder import weight_files

    if not fits:
        return "it does not fit"
    located = resolved.inputs.located
    if located.has_weights:
        return ""
    num_bytes = sum(path.stat().st_size for path in weight_files(located.path, located.name))
    return f"its weights ({size(num_bytes)}) are not downloaded yet; train does that"


def _probe(resolved: Any, values: Mapping[str, Any], root: Path, *, offline: bool, tick: Any) -> dict[str, Any]:
    from tunesmith.training.probe import probe

    found = probe(resolved.recipe, root=root, offline=offline, on_progress=tick)
    return found.values(resolved.forecast, values["tokens_per_step"])


def _draw(screen: Console, values: Mapping[str, Any]) -> None:
    from tunesmith.cli.display import plan_lines
    from tunesmith.cli.render import plan_panel, visible

    if screen.is_terminal:
        screen.print(plan_panel(values))
        for note in values["warnings"]:
            screen.print(f"note: {visible(note)}")
        return
    for line in plan_lines(values):
        screen.print(visible(line))
