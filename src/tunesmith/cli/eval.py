"""tunesmith eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Base, BaseAt, Json, Offline, Root, TaskOf, as_task, remember_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tunesmith.inference.measure import EvaluationResult


def evaluate(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder, hub id or .gguf file.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Data file with labels or answers.")],
    task: TaskOf = None,
    base: Base = False,
    model: BaseAt = None,
    samples: Annotated[
        int | None, typer.Option(min=0, help="Prompts to answer and score (default: 50 for tasks that write answers).")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="RUN|MODEL", help="Judge of answers before and after: gives rewards, or writes."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JSON line a row with its loss and prediction.")
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on a data file: the metrics of its task, with 95 % intervals.

    tunesmith eval last later.csv

    tunesmith eval HuggingFaceTB/SmolLM2-135M-Instruct held-out.jsonl --samples 8 --json
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.streams import json_line
    from tunesmith.runs.atomic import to_json, writing

    def keep(lines: Iterator[dict[str, Any]]) -> None:
        if out is not None:
            with writing(out) as file:
                file.writelines(to_json(line) + b"\n" for line in lines)

    options: dict[str, Any] = {"root": root, "base": base, "model": model, "task": task, "offline": offline}
    found = measured(target, data, samples=samples, judge=judge, keep=keep, **options)
    if as_json:
        values = {"task": found.task, "rows": found.num_rows, "trained_on": found.num_trained}
        values |= {"measures": found.measures, "baseline": found.baseline, "headline": found.headline}
        values |= {"details": found.details, "samples": found.samples}
        json_line({"kind": "eval", "target": target, "data": data, **values})
    else:
        _draw(found, out)


def measured(
    target: str,
    data: str,
    *,
    root: Path,
    base: bool,
    task: str | None,
    model: str | None = None,
    samples: int | None,
    judge: str | None = None,
    offline: bool,
    keep: Callable[[Iterator[dict[str, Any]]], None],
) -> EvaluationResult:
    """Evaluate RUN|MODEL, with progress and notes on stderr; `keep` gets the lines of its rows."""
    from tunesmith.cli.display import phases
    from tunesmith.cli.render import visible
    from tunesmith.cli.streams import console
    from tunesmith.formatting import PHASES
    from tunesmith.inference.load import load_any
    from tunesmith.inference.measure import evaluate_file

    screen = console(stderr=True)
    with phases(screen, {**PHASES, "evaluate": "measuring rows", "answer": "answering prompts"}) as progress:
        progress("load", 0, 1)
        loaded = load_any(target, root=root, base=base, task=as_task(task), model=model, offline=offline)
        arbiter = None if judge is None else load_any(judge, root=root, offline=offline)
        how: dict[str, Any] = {"judge": arbiter, "offline": offline, "on_progress": progress}
        found = evaluate_file(loaded, data, samples=samples, keep=keep, **how)
    for note in filter(None, [loaded.note, *found.notes]):
        screen.print(visible(f"note: {note}"), style="bright_black")
    return found


def _draw(found: EvaluationResult, out: Path | None) -> None:
    from tunesmith.cli.render import metrics_table, visible, with_bounds
    from tunesmith.cli.streams import console
    from tunesmith.evaluation.metrics import info_of
    from tunesmith.formatting import plural

    screen = console()
    title = f"{found.task}: {plural(found.num_rows, 'row')}; each value with its 95 % interval"
    if screen.is_terminal:
        screen.print(metrics_table(found.measures, title=title))
    else:
        screen.print(f"{found.task}: {plural(found.num_rows, 'row')}")
        for key, interval in found.measures.items():
            screen.print(f"{info_of(key).label}: {with_bounds(key, interval)}")
    for sentence in found.headline:
        screen.print(visible(sentence))
    if out is not None:
        screen.print(f"rows in {out}")
