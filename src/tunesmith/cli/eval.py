"""tunesmith eval, compare"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Base, BaseAt, Json, Offline, Root, Target, TaskOf, as_task, named, refuse_unusable
from tunesmith.cli.render import print_table
from tunesmith.cli.streams import console, json_line
from tunesmith.errors import InputError, RunError
from tunesmith.evaluation.metrics import info_of, refuse_no_answers
from tunesmith.phrases import one_line, plural, visible
from tunesmith.runs.atomic import from_json, to_json, write_atomic, writing
from tunesmith.runs.folder import Run, is_run
from tunesmith.summaries.runs import settings_that_differ
from tunesmith.summaries.words import PHASES, loss, option
from tunesmith.types import JsonObject, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from tunesmith.evaluation.compare import Comparison, Difference
    from tunesmith.inference.measure import EvaluationResult


def evaluate(
    target: Target,
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

    def keep(lines: Iterator[JsonObject]) -> None:
        if out is not None:
            with writing(out) as file:
                file.writelines(to_json(line) + b"\n" for line in lines)

    options: dict[str, Any] = {"root": root, "base": base, "model": model, "task": task, "offline": offline}
    result = measured(target, data, samples=samples, judge=judge, keep=keep, **options)
    if as_json:
        values = {"task": result.task, "rows": result.num_rows, "trained_on": result.num_trained}
        values |= {"measures": result.measures, "baseline": result.baseline, "headline": result.headline}
        values |= {"details": result.details, "samples": result.samples}
        json_line({"kind": "eval", "target": target, "data": data, **values})
    else:
        _draw(result, out)


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
    keep: Callable[[Iterator[JsonObject]], None],
    noted: set[str] | None = None,
) -> EvaluationResult:
    """Evaluate RUN|MODEL, with progress and notes on stderr; `keep` gets the lines of its rows, `noted` the
    notes: none but those on the run itself is repeated."""
    refuse_no_answers(samples, judge)
    target, of_task = named(target, root), as_task(task)
    refuse_unusable(target, data, root, of_task, answered=judge is None, offline=offline)
    from tunesmith.cli.display import phases
    from tunesmith.inference.load import load_any
    from tunesmith.inference.measure import evaluate_file

    screen = console(stderr=True)
    with phases(screen, {**PHASES, "evaluate": "measuring rows", "answer": "answering prompts"}) as progress:
        progress("load", 0, 1)
        loaded = load_any(target, root=root, base=base, task=of_task, model=model, offline=offline)
        of_export = export_note(loaded.located.path)
        arbiter = None if judge is None else load_any(judge, root=root, offline=offline)
        settings: dict[str, Any] = {"judge": arbiter, "offline": offline, "on_progress": progress}
        result = evaluate_file(loaded, data, samples=samples, keep=keep, **settings)
    noted = set() if noted is None else noted
    for note in filter(None, (loaded.note, of_export, *result.notes)):
        if note in noted and note != loaded.note and "this run" not in note:
            continue
        noted.add(note)
        screen.print(visible(f"note: {note}"), style="bright_black")
    return result


def export_note(place: Path) -> str:
    """A note on a model that is an export: why its loss differs from its run's."""
    from tunesmith.export.hub import CHECK_FILE

    folder = place if place.is_dir() else place.parent
    with suppress(OSError, KeyError, TypeError, ValueError):  # no such file, or another tool's
        facts = from_json((folder / CHECK_FILE).read_bytes())
        note = f"an export ({facts['target']}): `tunesmith show` has the loss of its run on rows held out there"
        if facts.get("loss_tuned") is None or facts.get("loss_exported") is None:
            return note
        was, now = loss(facts["loss_tuned"]), loss(facts["loss_exported"])
        return f"{note}; on the {facts['rows']} rows of its check the loss of the run was {was}, of this {now}"
    return ""


def _draw(found: EvaluationResult, out: Path | None) -> None:
    screen = console()
    trained = f", {found.num_trained:,} of them trained on by this run" if found.num_trained else ""
    screen.print(f"{found.task}: measured on {plural(found.num_rows, 'row')}{trained}")
    shown = [(info_of(key), interval) for key, interval in found.measures.items()]
    rows = [[info.label, info.text(interval["value"]), info.bounds(interval)] for info, interval in shown]
    print_table(screen, ["metric", "value", "95 % interval"], rows)
    for sentence in found.headline:
        screen.print(visible(sentence))
    if out is not None:
        screen.print(f"rows in {out}")


SHOWN = 5
"""Rows listed on which one is better, of each side; all with --json."""


def compare(
    targets: Annotated[list[str], typer.Argument(metavar="RUN|MODEL...", help="Runs; with --data also models.")],
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
    from tunesmith.evaluation.compare import HOLD_OUT_MORE, MEASURE_MORE, compare_runs

    targets = [named(target, root) for target in targets]
    if out is not None and (out.suffix.lower() not in (".html", ".htm") or out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out}: not a page in a folder that is there. Give FILE.html.")
    if len(targets) < 2:
        raise InputError("compare: one run was given. Write: tunesmith compare RUN RUN, or more of them.")
    if model is not None and (data is None or not any(is_run(name, root) for name in targets)):
        raise InputError(f"--model {model}: no run is measured here. Give --data FILE, or leave it out.")
    of_runs = [name for name in targets if is_run(name, root)] if data is not None or out is not None else []
    task = Run.open(of_runs[0], root).recipe().task if of_runs else None
    if data is None:
        sides = [_kept(name, root) for name in targets]
    else:
        measure = partial(_measured, data=data, task=task, root=root, offline=offline, noted=set())
        sides = [measure(name, base=model if is_run(name, root) else None) for name in targets]
    try:
        comparisons = compare_runs([side.rows for side in sides])
    except InputError as error:
        way = f"tunesmith compare {' '.join(targets)} --data FILE"
        raise InputError(f"{' and '.join(targets)}: {error} Or measure now: {way}") from error
    runs = [Run.open(name, root) for name in targets if is_run(name, root)]
    settings = settings_that_differ(runs) if len(runs) == len(targets) else {}
    way_to_more = HOLD_OUT_MORE if data is None else MEASURE_MORE
    if len(targets) == 2:
        _show_two(comparisons[0], targets, sides, settings, way_to_more, as_json=as_json)
    else:
        _show_many(comparisons, targets, settings, way_to_more, as_json=as_json)
    if out is not None:
        from tunesmith.evaluation.report.pages import as_html
        from tunesmith.evaluation.report.sections import comparison_page

        write_atomic(out, as_html(comparison_page(targets, comparisons, task or "")).encode())
        console(stderr=True).print(f"a page with the table and a picture: {out}")


def _show_many(
    found: Sequence[Comparison], names: Sequence[str], settings: JsonObject, way_to_more: str, *, as_json: bool
) -> None:
    """A row for each run: its values, and their differences from the first run."""
    from tunesmith.evaluation.compare import too_few

    unit = "document" if found[0].are_documents else "row"
    notes = list(dict.fromkeys(comparison.loss_note for comparison in found if comparison.loss_note))
    cautions = list(too_few(found[0].num_rows, unit, way_to_more))
    if as_json:
        runs = [
            {"name": name, "measures": _as_values(comparison.metrics), "loss_note": comparison.loss_note}
            for name, comparison in zip(names[1:], found, strict=True)
        ]
        values = {"a": names[0], "runs": runs, "notes": [*notes, *cautions], "settings": settings}
        json_line({"kind": "compare", "rows": found[0].num_rows, **values})
        return
    from tunesmith.evaluation.report.sections import comparison_table

    screen, table = console(), comparison_table(names, found)
    counted = plural(found[0].num_rows, unit)
    screen.print(visible(f"{counted} in common; differences from {names[0]} with 95 % intervals"))
    cells = [[" ".join(filter(None, (cell.text, cell.note))) for cell in row] for row in table.rows]
    for note in notes:
        screen.print(note)
    print_table(screen, [column.title for column in table.columns], cells)
    for sentence in cautions:
        screen.print(sentence)
    _print_settings(screen, names, settings)


def _print_settings(screen: Console, names: Sequence[str], settings: JsonObject) -> None:
    """The options in which the runs differ."""
    if settings:
        screen.print("options that differ")
        rows = [[key, *(one_line(option(value), 60) for value in values)] for key, values in settings.items()]
        print_table(screen, ["option", *names], rows)


@dataclass
class _Side:
    """One of the evaluations."""

    rows: list[JsonObject] = field(default_factory=list)
    answers: list[JsonObject] = field(default_factory=list)
    metrics: Record = field(default_factory=dict)
    baseline: Record | None = None


def _kept(name: str, root: Path) -> _Side:
    """The evaluation that a run made of its held-out rows when it ended."""
    from tunesmith.evaluation.report.values import kept_report

    run = Run.open(name, root)
    paths = [run.path / "evaluation" / f"{file}.jsonl" for file in ("after", "answers-after")]
    if not paths[0].exists():
        raise RunError(
            f"{run.path}: it has not measured held-out rows: no {paths[0].name} in its folder evaluation. "
            "Compare on a file with --data FILE, or continue it with `tunesmith resume`."
        )
    lines = [[from_json(line) for line in path.read_bytes().splitlines()] if path.exists() else [] for path in paths]
    if not run.report_path.exists():
        return _Side(lines[0], lines[1])
    report = kept_report(run)
    return _Side(lines[0], lines[1], report["metrics"]["after"]["measures"], report["baseline"])


def _measured(
    name: str, *, data: str, base: str | None, task: str | None, root: Path, offline: bool, noted: set[str]
) -> _Side:
    side = _Side()
    keep = side.rows.extend
    result = measured(
        name, data, root=root, base=False, task=task, model=base, samples=0, offline=offline, keep=keep, noted=noted
    )
    side.metrics, side.baseline = result.measures, result.baseline
    return side


def _two_values(
    found: Comparison, names: Sequence[str], sides: Sequence[_Side], num_answers: int, of_answers: Record
) -> JsonObject:
    """All of a comparison of two, JSON-ready; what a terminal prints of a row is in its "words"."""
    pairs = {"won": found.won, "lost": found.lost}
    of_rows = {key: [{"a": was, "b": now, "words": row_words(was, now)} for was, now in pairs[key]] for key in pairs}
    return {
        "kind": "compare",
        "a": names[0],
        "b": names[1],
        "rows": found.num_rows,
        "are_documents": found.are_documents,
        "only_a": found.only_a,
        "only_b": found.only_b,
        "same_targets": found.same_targets,
        "loss_note": found.loss_note,
        "measures": _as_values(found.metrics),
        "ties": found.num_ties,
        **of_rows,
        "baseline": {key: side.baseline for key, side in zip("ab", sides, strict=True)},
        "answers": {"num": num_answers, "measures": _as_values(of_answers), "texts": _both_texts(sides)},
    }


def _both_texts(sides: Sequence[_Side]) -> list[JsonObject]:
    """{source, prompt, reference, a, b} of each prompt that both sides answered."""
    of_a, of_b = ({(row["source"], row["prompt"]): row for row in side.answers} for side in sides)
    return [
        {**{key: row[key] for key in ("source", "prompt", "reference")}, "a": row["answer"], "b": of_b[place]["answer"]}
        for place, row in of_a.items()
        if place in of_b
    ]


def _as_values(measures: Mapping[str, Difference]) -> JsonObject:
    return {
        key: {"a": differs.a, "b": differs.b, "b_minus_a": differs.b_minus_a, "is_clear": differs.is_clear}
        for key, differs in measures.items()
    }


def _show_two(
    found: Comparison, names: Sequence[str], sides: Sequence[_Side], settings: JsonObject, way_to_more: str, *,
    as_json: bool,
) -> None:  # fmt: skip
    """Two runs side by side: every metric, and the rows on which one is better."""
    from tunesmith.evaluation.compare import baseline_sentence, compare_answers, too_few

    num_answers, of_answers = compare_answers(*(side.answers for side in sides))
    unit, b = "document" if found.are_documents else "row", names[1]
    notes = [found.loss_note] if found.loss_note else []
    if not found.same_targets:
        still = "; bits per byte do" if "bits_per_byte" in found.metrics else ""
        words = "loss, perplexity and token accuracy do not compare"
        notes.insert(0, f"the two split the text into different tokens: {words}{still}")
    baselines = [
        f"{name}: {baseline_sentence(side.metrics, side.baseline)}"
        for name, side in zip(names, sides, strict=True)
        if side.baseline is not None
    ]
    cautions = [*baselines, *too_few(found.num_rows, unit, way_to_more)]
    if as_json:
        values = _two_values(found, names, sides, num_answers, of_answers)
        json_line({**values, "notes": [*notes, *cautions], "settings": settings})
        return
    screen = console()
    is_once = not found.are_documents and len(sides[0].rows) > found.num_rows + found.only_a
    only = ["repeated ones counted once"] if is_once else []
    only += [f"{num:,} only in {name}" for num, name in zip((found.only_a, found.only_b), names, strict=True) if num]
    screen.print(visible("; ".join([f"{plural(found.num_rows, unit)} in common", *only])))
    screen.print(visible(f"A is {names[0]}, B is {b}; B − A: their difference on the same {unit}s, 95 % interval"))
    for note in notes:
        screen.print(note)
    _print_metrics(screen, found.metrics)
    for sentence in cautions:
        screen.print(visible(sentence))
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
    _print_settings(screen, names, settings)


def _print_metrics(screen: Console, metrics: Mapping[str, Difference]) -> None:
    rows = []
    for key, differs in metrics.items():
        info = info_of(key)
        rows.append([info.label, info.text(differs.a), info.text(differs.b), info.worth(differs.as_change())])
    print_table(screen, ["metric", "A", "B", "B − A"], rows)


def row_words(was: Record, now: Record) -> str:
    """A row in both evaluations: bad → good, right is good; or the loss of both."""
    from tunesmith.evaluation.report.values import label_text, target_of
    from tunesmith.evaluation.scores import num_right

    text = one_line(str(now.get("text", "")), 60)
    if "label" in now or "value" in now:
        bad, good, right = map(label_text, (was["predicted"], now["predicted"], target_of(now)))
        words = f"{bad} → {good}, right is {right}"
    elif "tags" in now:
        words = f"{num_right(was)} → {num_right(now)} of {len(now['tags'])} words right"
    else:
        words = f"loss {loss(was['loss'] / was['count'])} → {loss(now['loss'] / now['count'])}"
    return f"{words}: {text}" if text else words
