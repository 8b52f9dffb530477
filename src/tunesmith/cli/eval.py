"""tunesmith eval, compare"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Base, BaseAt, Json, Offline, Root, TaskOf, as_task, refuse_unreadable
from tunesmith.cli.render import loss, print_table
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError, RunError
from tunesmith.evaluation.metrics import info_of, refuse_no_answers
from tunesmith.phrases import PHASES, one_line, plural, visible
from tunesmith.runs.atomic import from_json, to_json, write_atomic, writing
from tunesmith.runs.folder import Run, is_run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from tunesmith.evaluation.compare import Comparison, Difference
    from tunesmith.inference.measure import EvaluationResult


def evaluate(
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

    if out is not None and out.exists() and Path(data).exists() and out.samefile(data):
        raise InputError(f"--out: {out}: is the data itself, which it would take the place of. Choose another file.")

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
    said: set[str] | None = None,
) -> EvaluationResult:
    """Evaluate RUN|MODEL, with progress and notes on stderr; `keep` gets the lines of its rows, `said` the notes: none
    but those on the run itself is repeated."""
    from tunesmith.cli.display import phases
    from tunesmith.inference.load import load_any
    from tunesmith.inference.measure import evaluate_file

    refuse_no_answers(samples, judge)
    refuse_unreadable([data])
    screen = console(stderr=True)
    with phases(screen, {**PHASES, "evaluate": "measuring rows", "answer": "answering prompts"}) as progress:
        progress("load", 0, 1)
        loaded = load_any(target, root=root, base=base, task=as_task(task), model=model, offline=offline)
        arbiter = None if judge is None else load_any(judge, root=root, offline=offline)
        how: dict[str, Any] = {"judge": arbiter, "offline": offline, "on_progress": progress}
        found = evaluate_file(loaded, data, samples=samples, keep=keep, **how)
    said = set() if said is None else said
    for note in filter(None, (loaded.note, *found.notes)):
        if note in said and note != loaded.note and "this run" not in note:
            continue
        said.add(note)
        screen.print(visible(f"note: {note}"), style="bright_black")
    return found


def _draw(found: EvaluationResult, out: Path | None) -> None:
    screen = console()
    screen.print(f"{found.task}: {plural(found.num_rows, 'row')}")
    shown = [(info_of(key), interval) for key, interval in found.measures.items()]
    rows = [[info.label, info.text(interval["value"]), info.bounds(interval)] for info, interval in shown]
    print_table(screen, ["metric", "value", "95 % interval"], rows)
    for sentence in found.headline:
        screen.print(visible(sentence))
    if out is not None:
        screen.print(f"rows in {out}")


SHOWN = 5
"""Rows listed on which one is better, of each side; all with --json."""
Targets = Annotated[list[str], typer.Argument(metavar="RUN|MODEL...", help="Runs; with --data also models.")]


def compare(
    targets: Targets,
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Evaluate all on this data file first.")
    ] = None,
    model: BaseAt = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with the table and a picture of differences.")
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Compare runs on the rows they share: metrics, clear differences, and of two the rows that one gets right.

    tunesmith compare support-3f2a support-77b0

    tunesmith compare support-3f2a support-77b0 support-19c4 --out compared.html

    tunesmith compare last HuggingFaceTB/SmolLM2-135M-Instruct --data held-out.jsonl
    """
    from tunesmith.evaluation.compare import compare_runs

    if len(targets) < 2:
        raise InputError("compare: one run was given. Write: tunesmith compare RUN RUN, or more of them.")
    if model is not None and (data is None or not any(is_run(name, root) for name in targets)):
        raise InputError(f"--model {model}: no run is measured here. Give --data FILE, or leave it out.")
    named = targets if data is not None or out is not None else ()
    tasks = [task for name in named if (task := _task_of(name, root))]
    if data is None:
        sides = [_kept(name, root) for name in targets]
    else:
        options: dict[str, Any] = {"task": next(iter(tasks), None), "root": root, "offline": offline, "said": set()}
        sides = [_measured(name, data, model if is_run(name, root) else None, **options) for name in targets]
    try:
        found = compare_runs([side.rows for side in sides])
    except InputError as error:
        names = " ".join(targets)
        raise InputError(
            f"{' and '.join(targets)}: {error} Or measure now: tunesmith compare {names} --data FILE"
        ) from error
    if len(targets) == 2:
        _show_two(found[0], (targets[0], targets[1]), sides, as_json=as_json)
    else:
        _show_many(found, targets, as_json=as_json)
    if out is not None:
        from tunesmith.evaluation.report.pages import as_html
        from tunesmith.evaluation.report.sections import comparison_page

        write_atomic(out, as_html(comparison_page(targets, found, next(iter(tasks), ""))).encode())
        console(stderr=True).print(f"a page with the table and a picture: {out}")


def _show_two(found: Comparison, names: tuple[str, str], sides: Sequence[_Side], *, as_json: bool) -> None:
    from tunesmith.evaluation.compare import compare_answers

    num_answers, of_answers = compare_answers(*(side.answers for side in sides))
    if as_json:
        values = {
            "baseline": {key: side.baseline for key, side in zip("ab", sides, strict=True)},
            "answers": {"num": num_answers, "measures": _as_values(of_answers)},
        }
        json_line({"kind": "compare", "a": names[0], "b": names[1], **as_values(found), **values})
    else:
        _print(found, names, sides, num_answers, of_answers)


def _show_many(found: Sequence[Comparison], names: Sequence[str], *, as_json: bool) -> None:
    """A row for each run: its values, and how they differ from those of the first run."""
    if as_json:
        runs = [{"name": name, "measures": _as_values(one.metrics)} for name, one in zip(names[1:], found, strict=True)]
        json_line({"kind": "compare", "rows": found[0].num_rows, "a": names[0], "runs": runs})
        return
    from tunesmith.evaluation.report.sections import comparison_table

    screen, unit, table = console(), "document" if found[0].are_documents else "row", comparison_table(names, found)
    counted = plural(found[0].num_rows, unit)
    screen.print(visible(f"{counted} in common; differences from {names[0]} with 95 % intervals"))
    cells = [[" ".join(filter(None, (cell.text, cell.note))) for cell in row] for row in table.rows]
    print_table(screen, [column.title for column in table.columns], cells)


@dataclass
class _Side:
    """One of the evaluations."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    baseline: Mapping[str, Any] | None = None
    is_kept: bool = True  # made when the run ended, not now on --data


def _kept(name: str, root: Path) -> _Side:
    """The evaluation that a run made of its held-out rows when it ended."""
    from tunesmith.evaluation.report.values import kept_report

    run = Run.open(name, root)
    paths = [run.path / "evaluation" / f"{file}.jsonl" for file in ("after", "answers-after")]
    if not paths[0].exists():
        raise RunError(
            f"{run.path}: it has not measured held-out rows: no {paths[0].name} in its folder evaluation. Compare on a "
            "file with --data FILE, or continue it with `tunesmith resume`."
        )
    lines = [[from_json(line) for line in path.read_bytes().splitlines()] if path.exists() else [] for path in paths]
    if not run.report_path.exists():
        return _Side(lines[0], lines[1])
    report = kept_report(run)
    return _Side(lines[0], lines[1], report["metrics"]["after"]["measures"], report["baseline"])


def _measured(name: str, data: str, base: str | None, **options: Any) -> _Side:
    side = _Side(is_kept=False)
    found = measured(name, data, base=False, model=base, samples=0, keep=side.rows.extend, **options)
    side.metrics, side.baseline = found.measures, found.baseline
    return side


def _task_of(name: str, root: Path) -> str | None:
    """The task of a run: a model that it is compared with is measured on the same."""
    return Run.open(name, root).recipe().task if is_run(name, root) else None


def as_values(found: Comparison) -> dict[str, Any]:
    """All of a comparison, JSON-ready."""
    return {
        "rows": found.num_rows,
        "are_documents": found.are_documents,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "same_targets": found.same_targets,
        "loss_note": found.loss_note,
        "measures": _as_values(found.metrics),
        "ties": found.num_ties,
        "won": [{"a": was, "b": now} for was, now in found.won],
        "lost": [{"a": was, "b": now} for was, now in found.lost],
    }


def _as_values(measures: Mapping[str, Difference]) -> dict[str, Any]:
    return {
        key: {"a": differs.a, "b": differs.b, "b_minus_a": differs.b_minus_a, "is_clear": differs.is_clear}
        for key, differs in measures.items()
    }


def _print(
    found: Comparison,
    names: tuple[str, str],
    sides: Sequence[_Side],
    num_answers: int,
    of_answers: Mapping[str, Difference],
) -> None:
    from tunesmith.evaluation.compare import HOLD_OUT_MORE, MEASURE_MORE, baseline_sentence, too_few

    screen, unit, b = console(), "document" if found.are_documents else "row", names[1]
    is_once = not found.are_documents and len(sides[0].rows) > found.num_rows + found.only_a
    only = ["repeated ones counted once"] if is_once else []
    only += [f"{num:,} only in {name}" for num, name in zip((found.only_a, found.only_b), names, strict=True) if num]
    screen.print(visible("; ".join([f"{plural(found.num_rows, unit)} in common", *only])))
    screen.print(visible(f"A is {names[0]}, B is {b}; B − A: their difference on the same {unit}s, 95 % interval"))
    if not found.same_targets:
        still = "; bits per byte do" if "bits_per_byte" in found.metrics else ""
        words = "loss, perplexity and token accuracy do not compare"
        screen.print(f"the two split the text into different tokens: {words}{still}")
    if found.loss_note:
        screen.print(found.loss_note)
    _print_metrics(screen, found.metrics)
    for name, side in zip(names, sides, strict=True):
        if side.baseline is not None:
            screen.print(visible(f"{name}: {baseline_sentence(side.metrics, side.baseline)}"))
    for sentence in too_few(found.num_rows, unit, HOLD_OUT_MORE if sides[0].is_kept else MEASURE_MORE):
        screen.print(sentence)
    if num_answers:
        screen.print(f"{plural(num_answers, 'prompt')} answered by both")
        _print_metrics(screen, of_answers)
    screen.print(
        f"{visible(b)} is better on {plural(len(found.won), unit)}, worse on {len(found.lost):,}, "
        f"and as good on {found.num_ties:,}"
    )
    for what, pairs in (("worse", found.lost), ("better", found.won)):
        for was, now in pairs[:SHOWN]:
            screen.print(visible(f"{what}: {now['source']}: {row_words(was, now)}"))
        if len(pairs) > SHOWN:
            screen.print(f"and {plural(len(pairs) - SHOWN, f'more {unit}')} on which it is {what} (--json lists all)")


def _print_metrics(screen: Console, metrics: Mapping[str, Difference]) -> None:
    rows = []
    for key, differs in metrics.items():
        info = info_of(key)
        rows.append([info.label, info.text(differs.a), info.text(differs.b), info.worth(differs.as_change())])
    print_table(screen, ["metric", "A", "B", "B − A"], rows)


def row_words(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A row in both evaluations: bad → good, right is good; or the loss of both."""
    text = one_line(str(now.get("text", "")), 60)
    if "label" in now:
        words = f"{_named(was['predicted'])} → {_named(now['predicted'])}, right is {_named(now['label'])}"
    elif "value" in now:
        words = f"{was['predicted']:g} → {now['predicted']:g}, right is {now['value']:g}"
    elif "tags" in now:
        hits = [
            sum(tag == found for tag, found in zip(row["tags"], row["predicted"], strict=True)) for row in (was, now)
        ]
        words = f"{hits[0]} → {hits[1]} of {len(now['tags'])} words right"
    else:
        words = f"loss {loss(was['loss'] / was['count'])} → {loss(now['loss'] / now['count'])}"
    return f"{words}: {text}" if text else words


def _named(label: str | Sequence[str]) -> str:
    return label if isinstance(label, str) else " + ".join(label) or "none"
