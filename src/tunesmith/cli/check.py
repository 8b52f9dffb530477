"""tunesmith check"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli.options import Json, Offline, Settings, files, mix_of, remember_json, to_overrides
from tunesmith.errors import InputError

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.recipe.schema import Recipe


def check(
    ctx: typer.Context,
    data: Annotated[list[str] | None, typer.Argument(metavar="DATA...", help="Files of rows.")] = None,
    eval_: Annotated[
        list[str] | None, typer.Option("--eval", metavar="DATA", help="Held-out rows: checked, and for overlap.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Also check tokens: lengths, template."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="Task to learn (default: detected from DATA).")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe; other options count more.")] = None,
    settings: Settings = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """List every problem of your data by line, with a way out, before anything is trained.

    tunesmith check support.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

    tunesmith check a.csv --set 'data.columns={prompt: question, completion: answer}'
    """
    remember_json(ctx, as_json)
    from tunesmith.recipe import load

    train = files(data)
    explicit = {"model": model, "data.train": train, "data.eval": files(eval_), "data.mix": mix_of(train), "task": task}
    chosen = load.load(str(recipe) if recipe else None, [*to_overrides(explicit), *(settings or [])])
    if not chosen.data.train:
        raise InputError("data.train: nothing was given. Write: tunesmith check DATA, or a --recipe that has it.")

    from tunesmith.cli.check_report import draw
    from tunesmith.cli.display import fetched, progress_bar
    from tunesmith.cli.streams import console, json_line
    from tunesmith.data.check import check as check_rows
    from tunesmith.data.splits import mix

    chosen = chosen.model_copy(update={"data": fetched(chosen.data, offline=offline)})
    with progress_bar(console(stderr=True), "checking rows") as tick:
        renderer = _renderer(chosen, offline) if chosen.model else None
        task = None if chosen.task == "auto" else chosen.task
        report = check_rows(chosen.data, renderer=renderer, task=task, progress=tick)
    usable = [file.usable for side in ("train", "replay") for file in report.files if file.side == side]
    sources = mix(chosen.data, usable) if report.ok else []
    if as_json:
        json_line({"kind": "check", "ok": report.ok, **asdict(report), "mix": sources})
    else:
        draw(report, sources)
    if not report.ok:
        raise typer.Exit(InputError.exit_code)


def _renderer(recipe: Recipe, offline: bool) -> Renderer | None:
    """The renderer that training would use; None if no row is good enough to detect the task.

    Raises ModelError if the model cannot learn the task.
    """
    from tunesmith.errors import DataError
    from tunesmith.inference.load import make_renderer
    from tunesmith.models.load import load_tokenizer, model_kind
    from tunesmith.models.resolve_model import resolve_model
    from tunesmith.models.size import model_size
    from tunesmith.planning.defaults import decide_before_rows, find_head

    located = resolve_model(recipe.model, revision=recipe.revision, offline=offline, weights=False)
    tokenizer, kind = load_tokenizer(located, recipe.data.template), model_kind(located)
    try:
        decided, _ = decide_before_rows(recipe, located, model_size(located), kind)
    except DataError:
        return None
    find_head(decided, located, kind)
    return make_renderer(decided, tokenizer, kind)
