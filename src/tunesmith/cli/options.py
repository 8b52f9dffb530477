"""Options that several commands share, and the recipe that they make."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.streams import console
from tunesmith.environment.packages import install_command
from tunesmith.errors import DataError, InputError, ModelError, RecipeError, RunError
from tunesmith.phrases import did_you_mean, visible
from tunesmith.runs import events
from tunesmith.runs.atomic import to_json
from tunesmith.runs.folder import Run, is_run, no_such_run, runs
from tunesmith.types import EXPORT_NAMES, TASK_NAMES, JsonObject, Problem, Record, TaskName

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Reading, Recipe

Root = Annotated[
    Path, typer.Option("--runs", envvar="TUNESMITH_RUNS", metavar="DIR", help="Folder that holds the runs.")
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, its name, the beginning of its name, or [bold]last[/].")
]
Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder, hub id or .gguf file.")]


def _remember_json(ctx: typer.Context, as_json: bool) -> bool:
    """Report errors as JSON too."""
    ctx.find_root().meta["json"] = as_json
    return as_json


Json = Annotated[
    bool,
    typer.Option("--json", callback=_remember_json, help="Print JSON on stdout, and everything for people on stderr."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the result.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every choice, every note and a row before the first step.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Open no network connection; use what is on this machine.")]
Base = Annotated[bool, typer.Option("--base", help="Use the untouched base of the run.")]
BaseAt = Annotated[
    str | None, typer.Option("--model", metavar="PATH", help="Place of the run's base model, if it was moved.")
]
TaskOf = Annotated[
    str | None, typer.Option("--task", metavar="TASK", help="Task of a MODEL; a run of preferences also takes chat.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any option of the recipe: --set method.rank=8. Repeatable."),
]

READ_KEYS = ("data.encoding", "data.suffixes", "data.bad_rows", "data.limits")
"""Options that say how rows are read."""
MEASURED_KEYS = (*READ_KEYS, "data.columns")
"""The same for rows that are measured."""
PREDICTED_KEYS = tuple(key for key in MEASURED_KEYS if key != "data.bad_rows")
"""The same for rows that are predicted: one that cannot be used has a line with its error in any case."""


def _set_of(keys: Sequence[str]) -> Any:
    return typer.Option("--set", metavar="KEY=VALUE", help=f"How rows are read: {', '.join(keys)}. Repeatable.")


ReadAs = Annotated[list[str] | None, _set_of(READ_KEYS)]
MeasuredAs = Annotated[list[str] | None, _set_of(MEASURED_KEYS)]
PredictedAs = Annotated[list[str] | None, _set_of(PREDICTED_KEYS)]

Grader = Annotated[
    str | None,
    typer.Option(
        metavar="GRADER", help="Task reinforce: file.py, file.py:FUNCTION, a grader in .json or .yaml, or run:RUN."
    ),
]
Teacher = Annotated[
    str | None,
    typer.Option(metavar="RUN|MODEL|URL", help="Task distil: the model to learn from, with the same vocabulary."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track", metavar="TRACKER", help="Send the run to tensorboard, wandb, mlflow or trackio: track. Repeatable."
    ),
]
Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="A folder, a hub id or a .gguf file.")]
Data = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="DATA",
        help="Data files, or hf://datasets/owner/name. [bold]a.jsonl:2[/]: each row twice an epoch. "
        "[bold]a.jsonl:0.7 b.jsonl:0.3[/]: shares.",
    ),
]
Eval = Annotated[
    list[str] | None,
    typer.Option("--eval", metavar="DATA", help="Held-out rows (default: a part of DATA, see data.held_out)."),
]
Task = Annotated[
    str | None,
    typer.Option(metavar="TASK", help=f"Task to learn: {', '.join(TASK_NAMES[1:])} (default: detected from DATA)."),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        "--method", metavar="METHOD", help="Training method: lora, dora, qlora, full or peft (default: auto)."
    ),
]
Rate = Annotated[float | None, typer.Option("--lr", metavar="RATE", help="Learning rate: optim.lr.")]
Epochs = Annotated[
    float | None, typer.Option("--epochs", metavar="N", help="Passes over the training rows: train.epochs.")
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="ROWS", help="Rows in one update: train.rows_per_step.")
]
Rank = Annotated[int | None, typer.Option("--rank", metavar="R", help="Rank of LoRA and its kin: method.rank.")]
Fast = Annotated[
    bool,
    typer.Option(
        "--fast", help="Measure nothing but held-out rows: evaluation.samples=0, .general=false, .surprising=0."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="Recipe file; options on the command line override it.")
]

OPTIONS = {
    "task": "--task",
    "method.name": "--method",
    "optim.lr": "--lr",
    "train.epochs": "--epochs",
    "train.rows_per_step": "--batch-size",
    "method.rank": "--rank",
    "reinforce.grader": "--grader",
    "distil.teacher": "--teacher",
}
"""Keys of the recipe that have an option of their own."""
FAST = ("evaluation.samples=0", "evaluation.general=false", "evaluation.surprising=0")
"""Settings of --fast."""

_WEIGHT = re.compile(r"(?P<path>.{2,}):(?P<weight>[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)", re.IGNORECASE)


def data_file(text: str) -> JsonObject:
    """`rows.jsonl`, or `rows.jsonl:0.5` with a weight; a file whose whole name is there wins. A single letter
    in front of the colon is a drive of Windows.

    Raises InputError for an empty name, and for a weight that is not a number above 0 and up to 100.
    """
    _refuse_empty([text])
    match = _WEIGHT.fullmatch(text)
    if match is None or Path(text).exists():
        path, _, word = text.rpartition(":")
        if path and Path(path).is_file() and not Path(text).exists():
            raise InputError(f"{text}: {word!r} is not a weight for {path}. Write a number above 0: {path}:0.5")
        return {"path": text}
    weight = float(match["weight"])
    if weight <= 0:
        raise InputError(f"{text}: its weight is {match['weight']}: it must be above 0. Leave the file out instead.")
    if weight > 100:
        raise InputError(f"{text}: its weight is {match['weight']}: 100 is the most, each row 100 times an epoch.")
    return {"path": match["path"], "weight": weight}


def mix_of(data: Sequence[Record]) -> str | None:
    """ "shares" for two or more files whose weights add up to 1; None: not decided by them."""
    weights = [file["weight"] for file in data if "weight" in file]
    return "shares" if len(weights) == len(data) > 1 and math.isclose(sum(weights), 1, abs_tol=1e-9) else None


def to_overrides(values: Record) -> list[str]:
    """Options of the command line as `key=value` in the form of `--set`.

    Values are JSON, which a recipe reads as YAML. None and empty lists are left out.
    """
    typed = {key: value for key, value in values.items() if value not in (None, [])}
    floats = {key: value for key, value in typed.items() if isinstance(value, float)}
    whole_numbers = {key: int(value) for key, value in floats.items() if value.is_integer()}
    return [f"{key}={to_json(value).decode()}" for key, value in {**typed, **whole_numbers}.items()]


def build_recipe(
    verb: str,
    model: str | None,
    data: Sequence[str] | None,
    *,
    held_out: Sequence[str] | None,
    recipe: Path | None,
    words: Record,
    settings: Sequence[str] | None,
    fast: bool = False,
    root: Path,
) -> Recipe:
    """The recipe of a command line: a file, overridden by options, overridden by `settings`.

    Raises InputError without a model or rows, where an option and a setting name one key, and for files and
    paths of models that are not there.
    """
    from tunesmith.recipe import load

    _refuse_twice(words, settings or ())
    train = files(data, once=True)
    explicit = {"model": model, "data.train": train, "data.eval": files(held_out), "data.mix": mix_of(train), **words}
    overrides = [*to_overrides(explicit), *(FAST if fast else ()), *(settings or ())]
    try:
        built = load.load(str(recipe) if recipe else None, overrides)
    except RecipeError as error:  # an option is named as it was typed
        message = str(error)
        for key in [key for key, value in words.items() if value is not None and key in OPTIONS]:
            message = message.replace(f"--set: {key}: ", f"{OPTIONS[key]}: ")
        raise RecipeError(message) from error
    paths = [file.path for file in (*built.data.train, *built.data.replay, *built.data.eval)]
    refuse_swapped(verb, built.model, paths)
    if not built.model or not built.data.train:
        missing = "model" if not built.model else "data.train"
        raise InputError(f"{missing}: nothing was given. Write: tunesmith {verb} MODEL DATA, or a --recipe with it.")
    refuse_unreadable(paths, built.data.reading)
    refuse_missing(built.model, root)
    if built.distil.teacher is not None and not built.distil.is_served:
        try:
            refuse_missing(built.distil.teacher, root)
        except ModelError as error:
            raise ModelError(f"distil.teacher: {error}") from None
    if built.reinforce.grader is not None:
        refuse_missing_grader(built.reinforce.grader, root)
    refuse_lacking(built.method.name, built.export.to)
    return built


def named(target: str, root: Path) -> str:
    """The path of the run that "last" means, which is printed on stderr with its state; any other target as it
    is."""
    runs_here = runs(root) if target == "last" and not Path(target).exists() else []
    if not runs_here:
        return target
    run = Run.open(target, root)
    line = f"last: {run.path}, {run.state()}"
    if run.state() != "done":
        with suppress(RunError):  # a damaged log, which the command itself says
            line += f" at step {getattr(events.newest(run.events_path), 'step', 0)}"
        done = [finished for finished in runs_here if finished.state() == "done"]
        if done:
            line += f"; the last finished run is {max(done, key=lambda finished: finished.created).path}"
    console(stderr=True).print(visible(line), style="bright_black", soft_wrap=True)
    return str(run.path)


def refuse_unknown_target(place: str, word: str) -> None:
    """Raise InputError for an export TARGET or TARGET:VALUE whose target does not exist, before torch loads."""
    target = word.partition(":")[0]
    if target not in EXPORT_NAMES:
        near = did_you_mean(target, EXPORT_NAMES)
        raise InputError(f"{place}: {word}: there is no such target.{near} One of {', '.join(EXPORT_NAMES)}.")


def refuse_lacking_export(place: str, word: str) -> None:
    """Raise InputError for an export whose packages are not installed, before torch is imported."""
    if word.partition(":")[0] == "onnx" and (
        missing := [name for name in ("onnxscript", "onnxruntime") if find_spec(name) is None]
    ):
        are = "are" if len(missing) > 1 else "is"
        way = f"`{install_command('onnx')}` installs all that is needed."
        raise InputError(f"{place}: onnx: {' and '.join(missing)} {are} not installed. {way}")


_ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".conll", ".txt", ".md", ".xlsx", ".gz")
"""Endings of data files."""


def refuse_swapped(verb: str, model: str, data: Sequence[str]) -> None:
    """Raise InputError for a data file in the place of the model, before anything heavy is loaded."""
    if not model.lower().endswith(_ROWS) or Path(model).is_dir():
        return
    other = next((path for path in data if _is_model(Path(path))), None)
    words = (
        f"tunesmith {verb} {shlex.quote(other)} {shlex.quote(model)}"
        if other
        else f"tunesmith {verb} MODEL {shlex.quote(model)}"
    )
    raise InputError(f"{model}: a data file, and the model comes first. Write: {words}")


def _is_model(path: Path) -> bool:
    """Whether a path looks like a model, as a folder or as one file."""
    return (path / "config.json").is_file() or path.suffix == ".gguf"


def refuse_missing(model: str, root: Path, *, offline: bool | None = None) -> None:
    """Raise ModelError for a model that is not there, before anything heavy is loaded. Nothing but the names of
    what is here decides about a path, and about a name that nearly names a folder or a run here; the hub is
    asked for any other name without an owner, unless `offline` is None."""
    from tunesmith.models.resolve_model import looks_like_path, resolve_model, split_revision

    if Path(model).expanduser().exists() or is_run(model, root):
        return
    name = split_revision(model)[0]
    if re.search(r"^[.~]|[/\\]|\.gguf$", model) and looks_like_path(name):
        resolve_model(model, offline=True)
    models_here = [path.name for path in Path().glob("[!.]*") if _is_model(path)]
    known = [*models_here, *(run.path.name for run in runs(root))]
    near = did_you_mean(name, known)
    if "/" in name or model.startswith("hf://") or not (near or offline is not None):
        return
    try:
        resolve_model(model, offline=bool(offline or near), weights=False)
    except ModelError as error:
        if near:
            way = f"For a model of the hub write hf://{name}."
            raise ModelError(f"{model}: no such folder, file or run.{near} {way}") from None
        raise ModelError(f"{no_such_run(model, root)} And no such model: {error}") from error


def refuse_missing_grader(grader: str, root: Path) -> None:
    """Raise InputError for a grader that is not there or cannot be read, and RunError for a reward run of it that
    is not there, before anything heavy is loaded. None of its code runs."""
    from tunesmith.graders.schema import RewardRun, load, parts_of

    for part in parts_of(load(grader)).values():
        if isinstance(part, RewardRun):
            Run.open(part.run, root)


def refuse_lacking(method: str, exports: Sequence[str]) -> None:
    """Raise InputError for a method or an export whose packages are not installed, before torch is imported."""
    extra = {"qlora": "bitsandbytes", "peft": "peft"}.get(method)
    if extra is not None and find_spec(extra) is None:
        way = f"Install it with: {install_command(extra)}, or use method: lora."
        raise RecipeError(f"method.name: {method}: needs the package {extra}, which is not installed. {way}")
    for word in exports:
        refuse_unknown_target("export.to", word)
        refuse_lacking_export("export.to", word)


def refuse_unusable(
    target: str,
    data: str,
    root: Path,
    task: TaskName | None,
    *,
    answered: bool,
    offline: bool,
    reading: Record,
) -> None:
    """Raise ModelError or DataError for a model that is not there, and a local file that cannot be read or of
    which a run can use no row that is `answered`, before anything heavy is loaded. `reading`: options of `data`
    that win over the run's."""
    from tunesmith.data.addresses import is_address
    from tunesmith.data.columns import usual_columns
    from tunesmith.data.examples import examples
    from tunesmith.recipe.schema import DataFile, resolved

    refuse_missing(target, root, offline=offline)
    refuse_unreadable([data], reading_of(target, root, reading))
    if is_address(data) or not is_run(target, root) or not answered:
        return
    recipe, problems = Run.open(target, root).recipe(), list[Problem]()
    task, file = task or resolved(recipe.task), DataFile(path=data)
    options = recipe.data.with_options({"train": (file,), "replay": (), "eval": (), **reading})
    if usual := usual_columns(options, task):
        options = options.model_copy(update={"columns": usual[0]})
    if not any(examples([file], options, problems.append, task=task)):
        raise DataError(f"{data}: no row of it can be used. Correct it, or name its columns.", problems)


def reading_options(settings: Sequence[str] | None, allowed: tuple[str, ...] = READ_KEYS) -> JsonObject:
    """The options of `data` from `--set` of a command that reads rows and trains nothing. Raises InputError for
    options that are not `allowed`."""
    from tunesmith.recipe.load import load

    for setting in settings or ():
        if not setting.startswith(allowed):
            raise InputError(f"--set {setting}: only options of reading do something here: {', '.join(allowed)}.")
    data = load(None, settings or ()).data
    return {key: getattr(data, key) for key in data.model_fields_set}


def reading_of(target: str, root: Path, overrides: Record) -> Reading:
    """Options by which the data of a run was read, for a model the defaults; `overrides` win."""
    from tunesmith.recipe.schema import Data

    data = Run.open(target, root).recipe().data if is_run(target, root) else Data()
    return data.with_options(overrides).reading


def refuse_unreadable(paths: Sequence[str], how: Reading) -> None:
    """Raise DataError for local data files that cannot be read, before anything heavy is loaded."""
    from tunesmith.data.addresses import is_address
    from tunesmith.data.read import inspect_files
    from tunesmith.recipe.schema import DataFile

    _refuse_empty(paths)
    inspect_files([DataFile(path=path) for path in paths if not is_address(path)], lambda problem: None, how)


def _refuse_empty(paths: Sequence[str]) -> None:
    if not all(path.strip() for path in paths):
        raise InputError("DATA is empty. Give the name of a file, a folder or an address.")


def _refuse_twice(words: Record, settings: Sequence[str]) -> None:
    set_keys = [setting.partition("=")[0].strip() for setting in settings]
    for key in [key for key, value in words.items() if value is not None and key in OPTIONS]:
        if twice := [set_key for set_key in set_keys if f"{key}.".startswith(f"{set_key}.")]:
            raise InputError(f"{OPTIONS[key]} and --set {twice[0]} both set {key}. Give one of them.")


def as_task(name: str | None) -> TaskName | None:
    """The task of that name. Raises InputError where there is none."""
    from tunesmith.tasks import TASKS

    if name is not None and name not in TASKS:
        raise InputError(f"--task: {name}: there is no such task. One of {', '.join(TASKS)}.")
    return name


def files(paths: Sequence[str] | None, *, once: bool = False) -> list[JsonObject]:
    """The files that were typed. Raises InputError for one given twice where each may be there `once`."""
    typed = [data_file(path) for path in paths or ()]
    names = [file["path"] for file in typed]
    if once and (twice := [name for name in names if names.count(name) > 1]):
        raise InputError(f"{twice[0]}: is there twice: give it once, with a weight ({twice[0]}:2).")
    return typed
