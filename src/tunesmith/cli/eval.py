"""tunesmith eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Base, Json, Offline, Root, TaskOf, as_task, remember_json

if TYPE_CHECKING:
    from tunesmith.predicting.measuring import Evaluation


def evaluate(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, or a model folder, hub id or .gguf file.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file of answered rows.")],
    task: TaskOf = None,
    base: Base = False,
    samples: Annotated[
        int, typer.Option(min=0, help="Also have this many prompts answered, and the answers measured.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JSON line a row: its loss, and what was answered.")
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Measure a model on rows of your own: the measures of its task, with their 95 % intervals.

    tunesmith eval last later.csv

    tunesmith eval HuggingFaceTB/SmolLM2-135M-Instruct held-out.jsonl --samples 8 --json
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.output import json_line
    from tunesmith.files import to_json, write_atomic

    found = measured(target, data, root=root, base=base, task=task, samples=samples, offline=offline)
    if out is not None:
        write_atomic(out, b"".join(to_json(line) + b"\n" for line in found.lines))
    if as_json:
        values = {"task": found.task, "rows": len(found.lines), "measures": found.measures, "details": found.details}
        json_line({"kind": "eval", "target": target, "data": data, **values, "samples": found.samples})
    else:
        _draw(found, out)


def measured(target: str, data: str, *, root: Path, base: bool, task: str | None, samples: int, offline: bool) -> Any:
    """The evaluation of what RUN|MODEL names, with its progress and notes on stderr."""
    from tunesmith.cli.display import PHASES
    from tunesmith.cli.output import console
    from tunesmith.cli.progress import phases
    from tunesmith.cli.text import visible
    from tunesmith.loading import load_target
    from tunesmith.predicting.measuring import evaluate_file

    screen = console(stderr=True)
    with phases(screen, {**PHASES, "evaluate": "measuring rows", "answer": "answering prompts"}) as progress:
        progress("load", 0, 1)
        speaker = load_target(target, root=root, base=base, task=as_task(task), offline=offline)
        majority = commonest_class(target, root)
        found = evaluate_file(speaker, data, samples=samples, majority=majority, on_progress=progress)
    for note in filter(None, [speaker.note, *found.notes]):
        screen.print(visible(f"note: {note}"), style="bright_black")
    return found


def commonest_class(target: str, root: Path) -> int | None:
    """The id of the class that most training rows of a run have; None for other tasks and for models."""
    from tunesmith.run import Run, is_run

    if not is_run(target, root):
        return None
    plan = next((event.values for event in Run.open(target, root).events() if event.kind == "plan"), {})
    counts = list(plan.get("labels", {}).values())
    return counts.index(max(counts)) if counts else None


def _draw(found: Evaluation, out: Path | None) -> None:
    from tunesmith.cli.output import console
    from tunesmith.cli.scores import info_of, measures_table, with_bounds
    from tunesmith.cli.text import plural

    screen = console()
    title = f"{found.task}: {plural(len(found.lines), 'row')}; in grey 95 % intervals"
    if screen.is_terminal:
        screen.print(measures_table(found.measures, title=title))
    else:
        screen.print(f"{found.task}: {plural(len(found.lines), 'row')}")
        for key, interval in found.measures.items():
            screen.print(f"{info_of(key).label}: {with_bounds(key, interval)}")
    if out is not None:
        screen.print(f"rows in {out}")
