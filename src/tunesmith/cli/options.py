"""Arguments that several verbs share, and how they become a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tunesmith.errors import InputError
from tunesmith.types import TaskName

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe

TASKS: tuple[TaskName, ...] = get_args(TaskName)

Root = Annotated[
    Path,
    typer.Option("--runs", envvar="TUNESMITH_RUNS", metavar="DIR", help="Folder that holds the runs."),
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, its name, the beginning of its name, or [bold]last[/].")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and everything for people on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the result.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no network connection; use what is on this machine.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the untouched model of the run.")]
BaseAt = Annotated[
    str | None,
    typer.Option("--model", metavar="PATH", help="Where the model of the run is now, if it was moved."),
]
TaskOf = Annotated[
    str | None, typer.Option("--task", metavar="|".join(TASKS), help="What to ask of a MODEL; a run knows.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A recipe key, dotted: method.rank=8. May be given many times."),
]

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder, a hub id or a .gguf file.")]
Data = Annotated[
    list[str] | None,
    typer.Argument(metavar="DATA", help="Files of rows. [bold]a.jsonl:2[/]: each row twice an epoch."),
]
Eval = Annotated[
    list[str] | None,
    typer.Option("--eval", metavar="DATA", help="Held-out rows; without, a part of DATA: data.held_out."),
]
Task = Annotated[str | None, typer.Option(metavar="auto|" + "|".join(TASKS), help="What is learnt.")]
MethodName = Annotated[
    str | None, typer.Option("--method", metavar="auto|lora|dora|qlora|full|peft", help="How weights change.")
]
Rate = Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate: optim.lr.")]
Epochs = Annotated[
    float | None, typer.Option("--epochs", metavar="N", help="Passes over the training rows: train.epochs.")
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="ROWS", help="Rows in one update: train.rows_per_step."),
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", help="Rank of LoRA and its kin: method.rank.")]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Measure only the loss of held-out rows: evaluation.samples=0, .general=false, .surprising=0.",
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="A recipe; other options count more.")
]

OPTIONS = {
    "task": "--task",
    "method.name": "--method",
    "optim.lr": "--lr",
    "train.epochs": "--epochs",
    "train.rows_per_step": "--batch-size",
    "method.rank": "--rank",
}
"""Keys of the recipe that have an option of their own."""
FAST = ("evaluation.samples=0", "evaluation.general=false", "evaluation.surprising=0")
"""Settings of --fast."""

_WEIGHT = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


def data_file(text: str) -> dict[str, Any]:
    """`rows.jsonl`, or `rows.jsonl:0.5` with a weight; a file whose whole name is there wins."""
    match = _WEIGHT.fullmatch(text)
    if match is None or Path(text).exists():
        return {"path": text}
    return {"path": match["path"], "weight": float(match["weight"])}


def given(values: Mapping[str, Any]) -> list[str]:
    """Settings that were given on the command line, as `key=value` in the form `--set` takes.

    Values are JSON, which a recipe reads as it reads YAML. None and empty lists were not given.
    """
    from tunesmith.runs.atomic import to_json

    return [f"{key}={to_json(value).decode()}" for key, value in values.items() if value not in (None, [])]


def chosen(
    verb: str,
    model: str | None,
    data: Sequence[str] | None,
    *,
    held_out: Sequence[str] | None,
    recipe: Path | None,
    words: Mapping[str, Any],
    settings: Sequence[str] | None,
    fast: bool = False,
) -> Recipe:
    """The recipe that a command line means: a file, and what was given with it, of which `settings` count most.

    Raises InputError without a model or rows, and where an option and a setting name one key.
    """
    from tunesmith.recipe import load

    _refuse_twice(words, settings or ())
    explicit = {"model": model, "data.train": files(data), "data.eval": files(held_out), **words}
    found = load.load(str(recipe) if recipe else None, [*given(explicit), *(FAST if fast else ()), *(settings or ())])
    if not found.model or not found.data.train:
        missing = "model" if not found.model else "data.train"
        raise InputError(
            f"{missing}: nothing was given. Write: tunesmith {verb} MODEL DATA, or a --recipe that has it."
        )
    return found


def _refuse_twice(words: Mapping[str, Any], settings: Sequence[str]) -> None:
    set_keys = [setting.partition("=")[0].strip() for setting in settings]
    for key in [key for key, value in words.items() if value is not None and key in OPTIONS]:
        if twice := [one for one in set_keys if f"{key}.".startswith(f"{one}.")]:
            raise InputError(f"{OPTIONS[key]} and --set {twice[0]} both set {key}. Give one of them.")


def as_task(name: str | None) -> TaskName | None:
    """The task of that name. Raises InputError where there is none."""
    found = next((task for task in TASKS if task == name), None)
    if name is not None and found is None:
        raise InputError(f"--task: {name}: there is no such task. One of {', '.join(TASKS)}.")
    return found


def remember_json(ctx: typer.Context, as_json: bool) -> None:
    """Errors are told to machines too where a machine is listening."""
    ctx.find_root().meta["json"] = as_json


def files(paths: Sequence[str] | None) -> list[dict[str, Any]]:
    return [data_file(path) for path in paths or ()]
