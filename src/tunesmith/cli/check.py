"""tunesmith check"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tunesmith.cli.errors import print_problems
from tunesmith.cli.options import Json, Offline, Settings, files, mix_of, remember_json, to_overrides
from tunesmith.cli.render import ACCENT, MUTED, percent, sample_row, visible
from tunesmith.cli.streams import console
from tunesmith.errors import InputError
from tunesmith.formatting import mix_text, plural

if TYPE_CHECKING:
    from tunesmith.data.check import CheckReport, TokenStats
    from tunesmith.data.renderer import Renderer
    from tunesmith.recipe.schema import Recipe


def check(
    ctx: typer.Context,
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

    for path in data or ():
        if (Path(path) / "config.json").is_file():
            raise InputError(f"{path}: a model folder, not data. Write: tunesmith check DATA --model {path}")
    train = files(data)
    explicit = {"model": model, "data.train": train, "data.eval": files(eval_), "data.mix": mix_of(train), "task": task}
    chosen = load.load(str(recipe) if recipe else None, [*to_overrides(explicit), *(settings or [])])
    if not chosen.data.train:
        raise InputError("data.train: nothing was given. Write: tunesmith check DATA, or a --recipe that has it.")

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


BAR = 32
"""Width of the longest bar of the histogram."""
MOST_CLASSES = 30
"""Classes drawn one by one."""


def draw(report: CheckReport, mix: Sequence[Mapping[str, Any]] = ()) -> None:
    """Problems first, then files, tokens and a first row, then the verdict."""
    screen = console()
    errors = [problem for problem in report.problems if problem.severity == "error"]
    warnings = [problem for problem in report.problems if problem.severity == "warning"]
    print_problems(errors, nums=report.errors, stderr=False)
    print_problems(warnings, nums=report.warnings, stderr=False)
    if report.problems:
        _say(screen, "")
    for what, counts in (("error", report.errors), ("warning", report.warnings)):
        if counts:
            by_code = ", ".join(f"{number:,} {code}" for code, number in sorted(counts.items()))
            _say(screen, f"{plural(sum(counts.values()), what)}: {by_code}")
    named = {problem.source.path for problem in errors}  # a file that cannot be read is said once
    for file in [file for file in report.files if file.is_readable or file.path not in named]:
        shape = f"{file.shape} in {file.format}" if file.shape else file.format or "unreadable"
        _say(screen, f"{file.path}: {shape}: {file.usable:,} of {plural(file.rows, 'row')} can be used")
    if mix:
        _say(screen, f"mix, before rows are held out: {mix_text(mix)}")
    for side, stats in report.tokens.items():
        _tokens(screen, side, stats)
    _labels(screen, report)
    for spans in report.first_rows[:1]:
        screen.print("", sample_row(spans, in_color=screen.color_system is not None), "", sep="\n")
    if any(file.usable for file in report.files):
        _say(screen, f"held out: {plural(report.held_out, 'row')}")
    for note in report.notes:
        _say(screen, f"note: {note}")
    listed = {f"{path} cannot be used as it is" for path in named}
    for refusal in [refusal for refusal in report.refusals if refusal not in listed] or report.refusals:
        screen.print(Text(f"refused: {visible(refusal)}", style="bold red"))
    if report.ok:
        _verdict(screen, report)


def _verdict(screen: Console, report: CheckReport) -> None:
    """The last line: held-out rows that are trained make what is measured worth less, or nothing."""
    seen, held = report.overlap.num, report.held_out
    if not seen:
        screen.print(Text("can be trained on", style="bold green"))
        return
    worth = "worthless" if 2 * seen >= held else "too good"
    which = f"{seen:,} of {plural(held, 'held-out row')} {'is' if seen == 1 else 'are'} also trained"
    text = f"can be trained on, but the measures will be {worth}: {which}"
    screen.print(Text(text, style="bold yellow"))


def _labels(screen: Console, report: CheckReport) -> None:
    """Classes with a bar each, the most frequent ones where there are many."""
    if not report.labels:
        return
    words = {"one": "one class a row", "many": "any number of classes a row", "tags": "a tag for each word"}
    _say(screen, f"labels: {len(report.labels):,} classes, {words[str(report.label_kind)]}")
    most = max(number for _, number in report.labels)
    listed = report.labels
    if len(listed) > MOST_CLASSES:
        listed = tuple(sorted(listed, key=lambda label: -label[1])[:MOST_CLASSES])
    for name, number in listed:
        bar = "█" * max(round(number / most * BAR), 1 if number else 0)
        shown = visible(name if len(name) <= 18 else f"{name[:17]}…")
        screen.print(Text.assemble((f"{shown:>18} ", MUTED), (f"{bar:<{BAR}}", ACCENT), f" {number:,}"))
    if len(listed) < len(report.labels):
        _say(screen, f"and {len(report.labels) - len(listed):,} rarer ones")


def _tokens(screen: Console, side: str, stats: TokenStats) -> None:
    share = percent(stats.trained / stats.tokens)
    _say(
        screen,
        f"{side}: {stats.tokens:,} tokens, {stats.trained:,} of them trained ({share}); a row has {stats.shortest:,} "
        f"to {stats.longest:,}, half have {stats.median:,} or less, 95 % have {stats.p95:,} or less",
    )
    most = max(stats.counts)
    for start, end, number in zip(stats.edges, stats.edges[1:], stats.counts, strict=False):
        bar = "█" * max(round(number / most * BAR), 1 if number else 0)
        label = f"{start:>8,}–{end - 1:<8,}"
        screen.print(Text.assemble((label, MUTED), (f"{bar:<{BAR}}", ACCENT), f" {number:,}"))


def _say(screen: Console, text: str) -> None:
    screen.print(Text(visible(text)))
