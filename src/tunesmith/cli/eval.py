"""tunesmith eval, compare"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import (
    MEASURED_KEYS,
    Base,
    BaseAt,
    Json,
    MeasuredAs,
    Offline,
    Root,
    Target,
    TaskOf,
    as_task,
    named,
    reading_options,
    refuse_unusable,
)
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
        typer.Option(metavar="RUN|MODEL", help="A judge of the answers: a reward model, or a chat model."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a JSON line for each row, with its loss and prediction.")
    ] = None,
    settings: MeasuredAs = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Evaluate a model on a data file: the metrics of its task, with 95 % intervals.

    tunesmith eval last later.csv

    tunesmith eval HuggingFaceTB/SmolLM2-135M-Instruct held-out.jsonl --samples 8 --json
    """

    if out is not None and out.exists() and Path(data).exists() and out.samefile(data):
        raise InputError(f"--out: {out}: is the data file itself, which would be overwritten. Choose another file.")

    def keep(lines: Iterator[JsonObject]) -> None:
        if out is not None:
            with writing(out) as file:
                file.writelines(to_json(line) + b"\n" for line in lines)

    options: dict[str, Any] = {"root": root, "base": base, "model": model, "task": task, "offline": offline}
    options["reading"] = reading_options(settings, MEASURED_KEYS)
    result = evaluate_target(target, data, samples=samples, judge=judge, keep=keep, **options)
    if as_json:
        values = {"task": result.task, "rows": result.num_rows, "trained_on": result.num_trained}
        values |= {"measures": result.measures, "baseline": result.baseline, "headline": result.headline}
        values |= {"details": result.details, "samples": result.samples}
        json_line({"kind": "eval", "target": target, "data": data, **values})
    else:
        _print_result(result, out)


def evaluate_target(
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
    shown_notes: set[str] | None = None,
    reading: Record,
) -> EvaluationResult:
    """Evaluate RUN|MODEL, with progress and notes on stderr.

    Args:
        keep: gets a line for each row.
        shown_notes: the notes that evaluations before this one have printed. They are not repeated, except on
            the run itself; new ones are added.
        reading: options of `data` that win over the run's.
    """
    refuse_no_answers(samples, judge)
    target, task_name = named(target, root), as_task(task)
    refuse_unusable(target, data, root, task_name, answered=judge is None, offline=offline, reading=reading)
    from tunesmith.cli.display import phases
    from tunesmith.inference.load import load_any
    from tunesmith.inference.measure import evaluate_file

    screen = console(stderr=True)
    with phases(screen, {**PHASES, "evaluate": "measuring rows", "answer": "answering prompts"}) as progress:
        progress("load", 0, 1)
        loaded = load_any(target, root=root, base=base, task=task_name, model=model, offline=offline).read_by(reading)
        note_of_export = export_note(loaded.located.path)
        loaded_judge = None if judge is None else load_any(judge, root=root, offline=offline)
        settings: dict[str, Any] = {"judge": loaded_judge, "offline": offline, "on_progress": progress}
        result = evaluate_file(loaded, data, samples=samples, keep=keep, **settings)
    shown_notes = set() if shown_notes is None else shown_notes
    for note in filter(None, (loaded.note, note_of_export, *result.notes)):
        is_on_run = note == loaded.note or "this run" in note
        if is_on_run or note not in shown_notes:
            shown_notes.add(note)
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


def _print_result(result: EvaluationResult, out: Path | None) -> None:
    screen = console()
    trained = f", {result.num_trained:,} of them trained on by this run" if result.num_trained else ""
    screen.print(f"{result.task}: measured on {plural(result.num_rows, 'row')}{trained}")
    metrics = [(info_of(key), interval) for key, interval in result.measures.items()]
    rows = [[info.label, info.text(interval["value"]), info.bounds(interval)] for info, interval in metrics]
    print_table(screen, ["metric", "value", "95 % interval"], rows)
    for sentence in result.headline:
        screen.print(visible(sentence))
    if out is not None:
        screen.print(f"rows in {out}")


SHOWN = 5
"""Most rows that are listed where a run is better, and where it is worse; --json has all."""


def compare(
    targets: Annotated[list[str], typer.Argument(metavar="RUN|MODEL...", help="Runs; with --data also models.")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Evaluate all on this data file first.")
    ] = None,
    model: BaseAt = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a page with the table and a plot."),
    ] = None,
    settings: MeasuredAs = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Compare runs on the rows they share: metrics and clear differences; of two runs also the rows where one
    is better.

    tunesmith compare support-3f2a support-77b0

    tunesmith compare support-3f2a support-77b0 support-19c4 --out compared.html

    tunesmith compare last HuggingFaceTB/SmolLM2-135M-Instruct --data held-out.jsonl
    """
    from tunesmith.evaluation.compare import HOLD_OUT_MORE, MEASURE_MORE, compare_runs

    targets = [named(target, root) for target in targets]
    run_names = [name for name in targets if is_run(name, root)]
    _refuse_incomparable(targets, run_names, data, model, out, settings)
    reading = reading_options(settings, MEASURED_KEYS)
    task = None
    if run_names and (data is not None or out is not None):
        task = Run.open(run_names[0], root).recipe().task
    if data is None:
        sides = [_stored_side(name, root) for name in targets]
    else:
        options: dict[str, Any] = {"data": data, "task": task, "root": root, "offline": offline, "reading": reading}
        shown: set[str] = set()
        sides = [
            _measured_side(name, base=model if name in run_names else None, shown_notes=shown, **options)
            for name in targets
        ]
    try:
        comparisons = compare_runs([side.rows for side in sides])
    except InputError as error:
        command = f"tunesmith compare {' '.join(targets)} --data FILE"
        raise InputError(f"{' and '.join(targets)}: {error} Or measure now: {command}") from error
    runs = [Run.open(name, root) for name in run_names]
    differing = settings_that_differ(runs) if len(runs) == len(targets) else {}
    way_to_more = HOLD_OUT_MORE if data is None else MEASURE_MORE
    if len(targets) == 2:
        _show_two(comparisons[0], targets, sides, differing, way_to_more, as_json=as_json)
    else:
        _show_many(comparisons, targets, differing, way_to_more, as_json=as_json)
    if out is not None:
        from tunesmith.evaluation.report.pages import as_html
        from tunesmith.evaluation.report.sections import comparison_page

        write_atomic(out, as_html(comparison_page(targets, comparisons, task or "")).encode())
        console(stderr=True).print(f"a page with the table and a plot: {out}")


def _refuse_incomparable(
    targets: Sequence[str], runs: Sequence[str], data: str | None, model: str | None, out: Path | None,
    settings: Sequence[str] | None,
) -> None:  # fmt: skip
    """Raise InputError for options of `compare` that do not go together. `runs`: the targets that are runs."""
    if out is not None and (out.suffix.lower() not in (".html", ".htm") or out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out}: has to be FILE.html in a folder that exists. Choose another name.")
    if len(targets) < 2:
        raise InputError("compare: one run was given. Write: tunesmith compare RUN RUN, or more of them.")
    if model is not None and (data is None or not runs):
        raise InputError(f"--model {model}: no run is measured here. Give --data FILE, or leave it out.")
    if settings and data is None:
        raise InputError(f"--set {settings[0]}: no rows are read here. Give --data FILE, or leave it out.")


def _show_many(
    comparisons: Sequence[Comparison], names: Sequence[str], settings: JsonObject, way_to_more: str, *, as_json: bool
) -> None:
    """Print a row for each run: its values, and their differences from the first run."""
    from tunesmith.evaluation.compare import too_few

    num_rows = comparisons[0].num_rows
    unit = "document" if comparisons[0].are_documents else "row"
    notes = list(dict.fromkeys(comparison.loss_note for comparison in comparisons if comparison.loss_note))
    cautions = list(too_few(num_rows, unit, way_to_more))
    if as_json:
        runs = [
            {"name": name, "measures": _as_values(comparison.metrics), "loss_note": comparison.loss_note}
            for name, comparison in zip(names[1:], comparisons, strict=True)
        ]
        values = {"a": names[0], "runs": runs, "notes": [*notes, *cautions], "settings": settings}
        json_line({"kind": "compare", "rows": num_rows, "drawn": comparisons[0].drawn, **values})
        return
    from tunesmith.evaluation.report.sections import comparison_table

    screen, table = console(), comparison_table(names, comparisons)
    screen.print(visible(f"{plural(num_rows, unit)} in common; differences from {names[0]} with 95 % intervals"))
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
    """One of the evaluations that are compared."""

    rows: list[JsonObject] = field(default_factory=list)
    answers: list[JsonObject] = field(default_factory=list)
    metrics: Record = field(default_factory=dict)
    baseline: Record | None = None


def _stored_side(name: str, root: Path) -> _Side:
    """The evaluation that a run made of its held-out rows when it ended."""
    from tunesmith.evaluation.report.values import kept_report

    run = Run.open(name, root)
    rows_path, answers_path = (run.path / "evaluation" / file for file in ("after.jsonl", "answers-after.jsonl"))
    if not rows_path.exists():
        raise RunError(
            f"{run.path}: it has not measured held-out rows: no {rows_path.name} in its folder evaluation. "
            "Compare on a file with --data FILE, or continue it with `tunesmith resume`."
        )
    side = _Side([from_json(line) for line in rows_path.read_bytes().splitlines()])
    if answers_path.exists():
        side.answers = [from_json(line) for line in answers_path.read_bytes().splitlines()]
    if run.report_path.exists():
        report = kept_report(run)
        side.metrics, side.baseline = report["metrics"]["after"]["measures"], report["baseline"]
    return side


def _measured_side(
    name: str,
    *,
    data: str,
    base: str | None,
    task: str | None,
    root: Path,
    offline: bool,
    shown_notes: set[str],
    reading: Record,
) -> _Side:
    """An evaluation on a file. `base`: the place of a run's model now."""
    side = _Side()
    options: dict[str, Any] = {"root": root, "base": False, "task": task, "model": base, "offline": offline}
    options |= {"shown_notes": shown_notes, "reading": reading}
    result = evaluate_target(name, data, samples=0, keep=side.rows.extend, **options)
    side.metrics, side.baseline = result.measures, result.baseline
    return side


def _two_values(
    comparison: Comparison, names: Sequence[str], sides: Sequence[_Side], num_answers: int, answer_metrics: Record
) -> JsonObject:
    """All of a comparison of two, JSON-ready. The "words" of a row are what a terminal prints of it."""

    def rows(pairs: Sequence[tuple[Record, Record]]) -> list[JsonObject]:
        return [{"a": was, "b": now, "words": row_words(was, now)} for was, now in pairs]

    return {
        "kind": "compare",
        "a": names[0],
        "b": names[1],
        "rows": comparison.num_rows,
        "drawn": comparison.drawn,
        "are_documents": comparison.are_documents,
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        "same_targets": comparison.same_targets,
        "loss_note": comparison.loss_note,
        "measures": _as_values(comparison.metrics),
        "ties": comparison.num_ties,
        "won": rows(comparison.won),
        "lost": rows(comparison.lost),
        "baseline": {key: side.baseline for key, side in zip("ab", sides, strict=True)},
        "answers": {"num": num_answers, "measures": _as_values(answer_metrics), "texts": _both_texts(sides)},
    }


def _both_texts(sides: Sequence[_Side]) -> list[JsonObject]:
    """{source, prompt, reference, a, b} of each prompt that both sides answered."""
    answers_a, answers_b = ({(row["source"], row["prompt"]): row for row in side.answers} for side in sides)
    shared_keys = ("source", "prompt", "reference")
    return [
        {**{key: row[key] for key in shared_keys}, "a": row["answer"], "b": answers_b[place]["answer"]}
        for place, row in answers_a.items()
        if place in answers_b
    ]


def _as_values(measures: Mapping[str, Difference]) -> JsonObject:
    return {
        key: {"a": change.a, "b": change.b, "b_minus_a": change.b_minus_a, "is_clear": change.is_clear}
        for key, change in measures.items()
    }


def _show_two(
    comparison: Comparison,
    names: Sequence[str],
    sides: Sequence[_Side],
    settings: JsonObject,
    way_to_more: str,
    *,
    as_json: bool,
) -> None:
    """Print two runs side by side: every metric, and the rows on which one is better."""
    from tunesmith.evaluation.compare import baseline_sentence, compare_answers, too_few

    num_answers, answer_metrics = compare_answers(*(side.answers for side in sides))
    unit = "document" if comparison.are_documents else "row"
    notes = [comparison.loss_note] if comparison.loss_note else []
    if not comparison.same_targets:
        what = "loss, perplexity and token accuracy cannot be compared"
        except_bits = "; bits per byte can" if "bits_per_byte" in comparison.metrics else ""
        notes.insert(0, f"the two split the text into different tokens: {what}{except_bits}")
    baselines = [
        f"{name}: {baseline_sentence(side.metrics, side.baseline)}"
        for name, side in zip(names, sides, strict=True)
        if side.baseline is not None
    ]
    cautions = [*baselines, *too_few(comparison.num_rows, unit, way_to_more)]
    if as_json:
        values = _two_values(comparison, names, sides, num_answers, answer_metrics)
        json_line({**values, "notes": [*notes, *cautions], "settings": settings})
        return
    screen = console()
    has_repeats = not comparison.are_documents and len(sides[0].rows) > comparison.num_rows + comparison.only_a
    counts = [f"{plural(comparison.num_rows, unit)} in common"]
    counts += ["repeated ones counted once"] if has_repeats else []
    only_here = zip((comparison.only_a, comparison.only_b), names, strict=True)
    counts += [f"{num:,} only in {name}" for num, name in only_here if num]
    screen.print(visible("; ".join(counts)))
    what = f"B − A: their difference on the same {unit}s, 95 % interval"
    screen.print(visible(f"A is {names[0]}, B is {names[1]}; {what}"))
    for note in notes:
        screen.print(note)
    _print_metrics(screen, comparison.metrics, comparison.drawn)
    for sentence in cautions:
        screen.print(visible(sentence))
    if num_answers:
        screen.print(f"{plural(num_answers, 'prompt')} answered by both")
        _print_metrics(screen, answer_metrics)
    screen.print(
        f"{visible(names[1])} is better on {plural(len(comparison.won), unit)}, "
        f"worse on {len(comparison.lost):,}, and as good on {comparison.num_ties:,}"
    )
    for verdict, pairs in (("worse", comparison.lost), ("better", comparison.won)):
        for was, now in pairs[:SHOWN]:
            screen.print(visible(f"{verdict}: {now['source']}: {row_words(was, now)}"))
        if len(pairs) > SHOWN:
            more = plural(len(pairs) - SHOWN, f"more {unit}")
            screen.print(f"and {more} on which it is {verdict} (--json lists all)")
    _print_settings(screen, names, settings)


def _print_metrics(screen: Console, metrics: Mapping[str, Difference], drawn: int | None = None) -> None:
    rows = []
    for key, change in metrics.items():
        info = info_of(key, drawn)
        rows.append([info.label, info.text(change.a), info.text(change.b), info.worth(change.as_change())])
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
