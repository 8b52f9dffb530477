"""tunesmith plan"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import TASKS, Json, Offline, Root, Settings, files, given, remember_json
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.recipe.knobs import Recipe


def plan(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder, a hub id or a .gguf file.")] = None,
    data: Annotated[list[str] | None, typer.Argument(metavar="DATA...", help="Files of rows.")] = None,
    eval_: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="DATA", help="Held-out rows; without, 5 % of DATA are held out."),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="auto|" + "|".join(TASKS), help="What is learnt.")] = None,
    method: Annotated[str | None, typer.Option(metavar="auto|lora|dora|full", help="How weights change.")] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe; other options count more.")] = None,
    settings: Settings = None,
    device: Annotated[
        str | None, typer.Option(metavar="H100-80G|24G|...", help="Plan for a card that is not here.")
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Say what `train` would do with MODEL and DATA and what it would need, without loading the model.

    tunesmith plan ./model support.jsonl

    tunesmith plan ./model support.jsonl --method full --device 24G
    """
    remember_json(ctx, as_json)
    from tunesmith.recipe import read

    explicit = {
        "model": model,
        "data.train": files(data),
        "data.eval": files(eval_),
        "task": task,
        "method.name": method,
    }
    words = [*given(explicit), *(settings or []), "memory=warn"]  # a plan tells what does not fit, and of what would
    chosen = read.load(str(recipe) if recipe else None, words)
    if not chosen.model or not chosen.data.train:
        missing = "model" if not chosen.model else "data.train"
        raise InputError(f"{missing}: nothing was given. Write: tunesmith plan MODEL DATA, or a --recipe that has it.")

    from tunesmith.cli.output import console, json_line

    values, fits = _foresee(chosen, root, offline=offline, device=device)
    if as_json:
        json_line({"kind": "plan", **values})
    else:
        _draw(console(), values)
    if not fits:
        raise typer.Exit(InputError.exit_code)


def _foresee(chosen: Recipe, root: Path, *, offline: bool, device: str | None) -> tuple[dict[str, Any], bool]:
    from tunesmith.cli.display import PHASES
    from tunesmith.cli.output import console
    from tunesmith.cli.progress import phases

    with phases(console(stderr=True), PHASES) as tick:
        from tunesmith.describing import foreseen_values
        from tunesmith.forecasting import foresee
        from tunesmith.planning.devices import named

        card = named(device) if device else None
        seen = foresee(chosen, root=root, offline=offline, on_progress=tick, device=card)
    return foreseen_values(seen), seen.forecast is None or seen.forecast.fits


def _draw(screen: Console, values: Mapping[str, Any]) -> None:
    from tunesmith.cli.display import plan_lines
    from tunesmith.cli.panels import plan_panel
    from tunesmith.cli.text import visible

    if screen.is_terminal:
        screen.print(plan_panel(values))
        for note in values["warnings"]:
            screen.print(f"note: {visible(note)}")
        return
    for line in plan_lines(values):
        screen.print(visible(line))
