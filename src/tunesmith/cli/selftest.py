"""tunesmith selftest"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import Json, Offline, Root, Settings, remember_json, to_overrides

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


def selftest(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder, hub id or .gguf file.")],
    settings: Settings = None,
    devices: Annotated[int, typer.Option(metavar="N", min=1, help="Compare N processes with one, too.")] = 1,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Check on your own model that packing, templates, micro-batches and resuming change no result.

    tunesmith selftest HuggingFaceTB/SmolLM2-135M-Instruct

    tunesmith selftest sentence-transformers/all-MiniLM-L6-v2 --set task=tag
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.streams import console, json_line

    recipe = recipe_of(target, settings or [], root=root)
    screen = console(stderr=as_json)
    from tunesmith.formatting import plural
    from tunesmith.training import selftest as proofs

    failed = 0
    for proof in proofs.selftest(recipe, offline=offline, devices=devices):
        failed += not proof.passed
        if as_json:
            json_line(asdict(proof))
        screen.print(f"{'✓' if proof.passed else '✗'} {proof.name}: {proof.found}", style="" if proof.passed else "red")
    if failed:
        screen.print(f"{plural(failed, 'proof')} failed: training this model here is not reliable.", style="red")
        raise typer.Exit(1)


def recipe_of(target: str, settings: list[str], *, root: Path) -> Recipe:
    """The recipe of a run, or a fresh one for a model."""
    from tunesmith.recipe import load
    from tunesmith.recipe.origin import moved_to
    from tunesmith.runs.folder import Run, is_run

    if is_run(target, root):
        run = Run.open(target, root)
        return moved_to(run.place(load.load(str(run.recipe_path), settings)))
    return load.load(None, [*to_overrides({"model": target}), *settings])
