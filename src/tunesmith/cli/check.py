"""tunesmith check, plan, recipe"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tunesmith.cli import options
from tunesmith.cli.errors import print_problems
from tunesmith.cli.options import build_recipe, files, mix_of, to_overrides
from tunesmith.cli.render import sample_row
from tunesmith.cli.streams import console, json_line
from tunesmith.environment.process import refuse_ranks
from tunesmith.errors import DataError, InputError
from tunesmith.phrases import plural, size, visible
from tunesmith.summaries import checks
from tunesmith.types import JsonObject, Record

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.data.check import CheckReport
    from tunesmith.data.renderer import Renderer
    from tunesmith.recipe.schema import Recipe


Lines = Annotated[
    str | None, typer.Option("--rows", metavar="LINES", help="Show these rows as they are read: 812, 801-820.")
]


def check(
    data: Annotated[list[str] | None, typer.Argument(metavar="DATA...", help="Files of rows.")] = None,
    eval_: Annotated[
        list[str] | None, typer.Option("--eval", metavar="DATA", help="Held-out rows: checked, and for overlap.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Also check tokens: lengths, template.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="Task to learn (default: detected from DATA).")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe; other options count more.")] = None,
    settings: options.Settings = None,
    rows: Lines = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """List every problem of your data by line, with a way out, before anything is trained.

    tunesmith check support.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

    tunesmith check a.csv --set 'data.columns={prompt: question, completion: answer}'
    """
    from tunesmith.recipe import load

    for path in data or ():
        if (Path(path) / "config.json").is_file() and (Path(path) / "tokenizer_config.json").is_file():
            raise InputError(f"{path}: a model folder, not data. Write: tunesmith check DATA --model {path}")
    train = files(data, once=True)
    explicit = {
        "model": model,
        "data.train": train,
        "data.eval": files(eval_),
        "data.mix": mix_of(train),
        "task": task,
    }
    chosen = load.load(str(recipe) if recipe else None, [*to_overrides(explicit), *(settings or [])])
    if not chosen.data.train:
        raise InputError("data.train: nothing was given. Write: tunesmith check DATA, or a --recipe that has it.")

    from tunesmith.cli.display import phases, pinned
    from tunesmith.data.check import check as check_rows
    from tunesmith.data.splits import mix

    chosen = chosen.model_copy(update={"data": pinned(chosen.data, offline=offline)})
    if rows is not None:
        _show_rows(chosen, rows, offline=offline, as_json=as_json)
        return
    with phases(console(stderr=True)) as tick:
        renderer = _renderer(chosen, offline) if chosen.model else None
        task = None if chosen.task == "auto" else chosen.task
        report = check_rows(chosen.data, renderer=renderer, task=task, progress=partial(tick, "check"))
    usable = [file.usable for side in ("train", "replay") for file in report.files if file.side == side]
    sources = mix(chosen.data, usable) if report.ok else []
    if as_json:
        json_line(check_values(report, sources))
    else:
        draw(report, sources)
    if not report.ok:
        raise typer.Exit(InputError.exit_code)


def _show_rows(recipe: Recipe, lines: str, *, offline: bool, as_json: bool) -> None:
    """Print rows of the first file as the model reads them. Raises InputError for lines that are no range."""
    from tunesmith.summaries.rows import rows_as_read

    first, _, last = lines.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise InputError(f"--rows: {lines}: is no line and no range of lines. Give one such as 812 or 801-820.")
    task = None if recipe.task == "auto" else recipe.task
    renderer = _renderer(recipe, offline) if recipe.model else None
    read = rows_as_read(recipe.data, task, renderer, int(first), int(last or first))
    if as_json:
        json_line({"kind": "rows", "rows": read})
        return
    screen = console()
    for row in read:
        count = "" if row["tokens"] is None else f": {plural(row['tokens'], 'token')}, {row['trained']:,} learnt"
        _say(screen, f"line {row['line']}{count}")
        screen.print(sample_row(row["spans"], in_color=screen.color_system is not None), "")
        for problem in row["problems"]:
            _say(screen, f"{problem['code']}: {problem['message']} {problem['fix']}".rstrip())


def _renderer(recipe: Recipe, offline: bool) -> Renderer | None:
    """The renderer that training would use; None if no row is good enough to detect the task.

    Raises ModelError if the model cannot learn the task.
    """
    from tunesmith.inference.load import make_renderer
    from tunesmith.models.load import load_tokenizer, model_kind
    from tunesmith.models.resolve_model import resolve_model
    from tunesmith.models.size import model_size
    from tunesmith.planning.decisions import Decisions
    from tunesmith.planning.defaults import decide_before_rows, find_head

    located = resolve_model(recipe.model, revision=recipe.revision, offline=offline, weights=False)
    tokenizer, kind = load_tokenizer(located, recipe.data.template), model_kind(located)
    try:
        decisions = Decisions(recipe)
        decide_before_rows(decisions, located, model_size(located), kind)
        decided = decisions.folded()
    except DataError:
        return None
    find_head(decided.task, located, kind)
    return make_renderer(decided, tokenizer, kind)


def draw(report: CheckReport, mix: Sequence[Record] = ()) -> None:
    """Problems first, then files, tokens and a first row, then the verdict."""
    screen, values = console(), check_values(report, mix)
    errors = [problem for problem in report.problems if problem.severity == "error"]
    warnings = [problem for problem in report.problems if problem.severity == "warning"]
    rows = {file.path: file.rows for file in report.files}
    print_problems(errors, nums=report.errors, rows=rows, stderr=False)
    print_problems(warnings, nums=report.warnings, rows=rows, stderr=False)
    if report.problems:
        _say(screen, "")
    for line in (*checks.problem_counts(values), *checks.file_lines(values), *checks.token_lines(values)):
        _say(screen, line)
    for place, spans in report.forms:
        sample = sample_row(spans, in_color=screen.color_system is not None)
        sample.rstrip()
        screen.print("", *([Text(visible(place))] if len(report.forms) > 1 else []), sample, "", sep="\n")
    for line in checks.other_lines(values):
        _say(screen, line)
    for refusal in checks.refusals(values):
        screen.print(Text(f"refused: {visible(refusal)}", style="bold red"))
    if report.ok:
        text, is_good = checks.verdict(values)
        screen.print(Text(text, style="bold green" if is_good else "bold yellow"))


def check_values(report: CheckReport, mix: Sequence[Record]) -> JsonObject:
    """The values that `--json` prints."""
    return {"kind": "check", "ok": report.ok, **asdict(report), "mix": mix}


def _say(screen: Console, text: str) -> None:
    screen.print(Text(visible(text)))


def plan(
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
    recipe: options.RecipeFile = None,
    settings: options.Settings = None,
    device: Annotated[
        str | None, typer.Option(metavar="CARDS", help="Plan for cards that are not here: H100-80G, 24G, 8xH100, ...")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Load the model in a process of its own and measure, too.")
    ] = True,
    root: options.Root = Path("runs"),
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Say what `train` would do with MODEL and DATA and what it would need; then try its heaviest step.

    tunesmith plan ./model support.jsonl

    tunesmith plan ./model support.jsonl --method full --device 24G
    """
    refuse_ranks(os.environ)
    # A plan says what does not fit, and what would.
    words = {"task": task, "method.name": method, "optim.lr": lr, "train.epochs": epochs}
    words |= {"train.rows_per_step": batch_size, "method.rank": rank, "reinforce.grader": grader}
    words["distil.teacher"] = teacher
    settings = [*(settings or []), "memory=warn"]
    wanted = build_recipe(
        "plan", model, data, held_out=eval_, recipe=recipe, words=words, settings=settings, fast=fast, root=root
    )

    values, fits = _resolve(wanted, root, offline=offline, device=device, probe=probe)
    values.get("given", {}).pop("memory", None)  # it was set above, by nobody
    if as_json:
        json_line({"kind": "plan", **values})
    else:
        from tunesmith.cli.display import print_plan

        print_plan(console(), values)
    if not fits:
        raise typer.Exit(InputError.exit_code)


def _resolve(recipe: Recipe, root: Path, *, offline: bool, device: str | None, probe: bool) -> tuple[JsonObject, bool]:
    from tunesmith.cli.display import phases
    from tunesmith.parallel.launch import devices_of

    with phases(console(stderr=True)) as tick:
        from tunesmith.planning.devices import named_group
        from tunesmith.training.resolve import resolve_run
        from tunesmith.training.summary import resolved_values

        card, devices = named_group(device) if device else (None, devices_of(recipe))
        if (recipe.devices, devices) != ("auto", 1):  # else the plan would say that it was given
            recipe = recipe.model_copy(update={"devices": devices})
        place: dict[str, Any] = {"device": card, "apart": probe}
        resolved = resolve_run(recipe, root=root, offline=offline, on_progress=tick, **place)
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
    from tunesmith.runs.atomic import free_bytes

    needed = forecast.disk.checkpoints + forecast.disk.result if forecast else 0
    free = free_bytes(root)
    if needed <= free:
        return ""
    return f"{root}: the disk has {size(free)} free, but this run needs {size(needed)}: train will refuse it"


def _why_not(resolved: Any, *, fits: bool) -> str:
    """Why a plan for this machine is not tried; empty: it is."""
    from tunesmith.graders import schema
    from tunesmith.models.folder import weight_files

    if not fits:
        return "it does not fit"
    grader = schema.load(resolved.recipe.grader_at) if resolved.rows.is_prompts else None
    if grader is not None and any(isinstance(part, schema.ScoreModel) for part in schema.parts_of(grader).values()):
        return "its grader calls a judge at an address, which a plan does not: --set train.max_steps=2 tries two steps"
    if resolved.recipe.distil.is_served:
        return "its teacher is at an address, which a plan does not ask: --set train.max_steps=2 tries two steps"
    located = resolved.inputs.located
    if located.has_weights:
        return ""
    num_bytes = sum(path.stat().st_size for path in weight_files(located.path, located.name))
    return f"its weights ({size(num_bytes)}) are not downloaded yet; train does that"


def _probe(resolved: Any, values: Record, root: Path, *, offline: bool, tick: Any) -> JsonObject:
    from tunesmith.training.probe import probe

    probed = probe(resolved.recipe, root=root, offline=offline, on_progress=tick)
    return probed.values(resolved.forecast, values["tokens_per_step"])


def recipe(
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="A recipe to complete.")] = None,
    settings: options.Settings = None,
) -> None:
    """Print a complete recipe with a comment on every option, ready to be edited.

    tunesmith recipe > recipe.yaml
    """
    from tunesmith.recipe import docs, load

    typer.echo(docs.as_yaml(load.load(file, settings or []), comments=True), nl=False)
