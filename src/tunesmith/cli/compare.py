"""tunesmith compare"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.options import Json, Offline, Root, remember_json
from tunesmith.errors import InputError, RunError

if TYPE_CHECKING:
    from rich.console import Console

    from tunesmith.evaluation.compare import Comparison, Difference

SHOWN = 10
"""Rows listed on which one is better, of each side; all with --json."""
Target = Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run; with --data also a model.")]


def compare(
    ctx: typer.Context,
    a: Target,
    b: Target,
    data: Annotated[str | None, typer.Option("--data", metavar="FILE", help="Measure both on these rows now.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="With --data: where the model of the runs is now; twice: of each."),
    ] = None,
    root: Root = Path("runs"),
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Put two runs side by side on the rows they share: measures, what differs beyond chance, rows that flipped.

    tunesmith compare support-3f2a support-77b0

    tunesmith compare last HuggingFaceTB/SmolLM2-135M-Instruct --data held-out.jsonl
    """
    remember_json(ctx, as_json)
    from tunesmith.cli.output import json_line
    from tunesmith.evaluation.compare import compare_answers, compare_rows

    answers: list[list[dict[str, Any]]] = [[], []]
    bases = _bases(model or [], data, (a, b), root)
    if data is None:
        rows: list[list[dict[str, Any]]] = [_kept(name, root) for name in (a, b)]
        answers = [_kept_answers(name, root) for name in (a, b)]
        baselines = [_kept_baseline(name, root) for name in (a, b)]
    else:
        from tunesmith.cli.eval import measured

        asked: dict[str, Any] = {
            "root": root,
            "base": False,
            "task": _task_of(a, root) or _task_of(b, root),
            "offline": offline,
        }
        rows = [[], []]
        both = [
            measured(name, data, samples=0, keep=lines.extend, model=base, **asked)
            for name, base, lines in zip((a, b), bases, rows, strict=True)
        ]
        baselines = [{"measures": one.measures, "baseline": one.baseline} for one in both]
    try:
        found = compare_rows(*rows)
    except InputError as error:
        raise InputError(f"{a} and {b}: {error} Or measure both now: tunesmith compare {a} {b} --data FILE") from error
    num_answers, of_answers = compare_answers(*answers)
    if as_json:
        told = {"num": num_answers, "measures": _as_values(of_answers)}
        beside = {side: one["baseline"] for side, one in zip("ab", baselines, strict=True)}
        json_line({"kind": "compare", "a": a, "b": b, **as_values(found), "baseline": beside, "answers": told})
    else:
        _draw(found, a, b, num_answers, of_answers, baselines)


def _bases(given: Sequence[str], data: str | None, names: Sequence[str], root: Path) -> list[str | None]:
    """Where the base of A and that of B are now. Raises InputError where nothing is loaded, or for a third one."""
    from tunesmith.runs.folder import is_run

    if given and data is None:
        raise InputError("--model: what the runs have measured is compared, and no model is loaded. Leave it out.")
    runs = [is_run(name, root) for name in names]
    if len(given) > max(1, sum(runs)) or (given and not any(runs)):
        raise InputError(f"--model: given {len(given)} times, and {sum(runs)} of {' and '.join(names)} are runs.")
    left = [*given, *given[-1:]]
    return [left.pop(0) if is_one and left else None for is_one in runs]


def _kept(name: str, root: Path) -> list[dict[str, Any]]:
    """What the run found of its held-out rows when it had ended."""
    from tunesmith.runs.atomic import from_json
    from tunesmith.runs.folder import Run

    run = Run.open(name, root)
    path = run.path / "evaluation" / "after.jsonl"
    if not path.exists():
        raise RunError(
            f"{run.path}: it has not measured held-out rows: no {path.name} in its folder evaluation. Compare on a "
            "file with --data FILE, or go on with `tunesmith resume`."
        )
    return [from_json(line) for line in path.read_bytes().splitlines()]


def _kept_answers(name: str, root: Path) -> list[dict[str, Any]]:
    """The run's answers to held-out prompts with their scores; none where it gave none."""
    from tunesmith.runs.atomic import from_json
    from tunesmith.runs.folder import Run

    path = Run.open(name, root).path / "evaluation" / "answers-after.jsonl"
    return [from_json(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def _kept_baseline(name: str, root: Path) -> dict[str, Any]:
    """The measures of a run's held-out rows, and what a constant answer gets there; nothing where it has no report."""
    from tunesmith.evaluation.report.build import up_to_date
    from tunesmith.runs.folder import Run

    run = Run.open(name, root)
    if not run.report_path.exists():
        return {"measures": {}, "baseline": None}
    report = up_to_date(run, run.read_json("report.json"))
    return {"measures": report["metrics"]["after"]["measures"], "baseline": report["baseline"]}


def _task_of(name: str, root: Path) -> str | None:
    """What a run was tuned for: a model beside it is asked for the same."""
    from tunesmith.runs.folder import Run, is_run

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


def _draw(
    found: Comparison,
    a: str,
    b: str,
    num_answers: int,
    of_answers: Mapping[str, Difference],
    baselines: Sequence[Mapping[str, Any]],
) -> None:
    from tunesmith.cli.output import console
    from tunesmith.cli.text import visible
    from tunesmith.evaluation.verdicts import baseline_sentence, too_few
    from tunesmith.formatting import plural

    screen = console()
    unit = "document" if found.are_documents else "row"
    only = [f"{num:,} only in {name}" for num, name in ((found.only_a, a), (found.only_b, b)) if num]
    screen.print(visible("; ".join([f"{plural(found.num_rows, unit)} in common", *only])))
    if not found.same_targets:
        still = "; bits per byte do" if "bits_per_byte" in found.metrics else ""
        words = "loss, perplexity and tokens guessed right do not compare"
        screen.print(f"the two cut the text into different tokens: {words}{still}")
    if found.loss_note:
        screen.print(found.loss_note)
    _print_measures(screen, found.metrics, a, b)
    for name, one in zip((a, b), baselines, strict=True):
        if one["baseline"] is not None:
            screen.print(visible(f"{name}: {baseline_sentence(one['measures'], one['baseline'])}"))
    for sentence in too_few(found.num_rows, unit):
        screen.print(sentence)
    if num_answers:
        screen.print(f"{plural(num_answers, 'prompt')} answered by both")
        _print_measures(screen, of_answers, a, b)
    screen.print(
        f"{visible(b)} is better on {plural(len(found.won), unit)}, worse on {len(found.lost):,}, "
        f"and as good on {found.num_ties:,}"
    )
    for what, pairs in (("worse", found.lost), ("better", found.won)):
        for was, now in pairs[:SHOWN]:
            screen.print(visible(f"{what}: {now['source']}: {row_words(was, now)}"))
        if len(pairs) > SHOWN:
            screen.print(f"and {plural(len(pairs) - SHOWN, f'more {unit}')} on which it is {what} (--json lists all)")


def _print_measures(screen: Console, measures: Mapping[str, Difference], a: str, b: str) -> None:
    if screen.is_terminal:
        screen.print(_table(measures, a, b))
        return
    for line in metric_lines(measures):
        screen.print(line)


def metric_lines(measures: Mapping[str, Difference]) -> Iterator[str]:
    """Each measure as a line: both values, and the paired interval of what lies between."""
    from tunesmith.evaluation.metrics import info_of

    for key, differs in measures.items():
        info = info_of(key)
        sure = "" if differs.is_clear else ", may be chance"
        between = info.difference(differs.b_minus_a)
        yield f"{info.label}: {info.text(differs.a)} and {info.text(differs.b)}, B - A {between}{sure}"


def _table(measures: Mapping[str, Difference], a: str, b: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from tunesmith.cli.scores import BETTER, MUTED, WORSE
    from tunesmith.cli.text import one_line
    from tunesmith.evaluation.metrics import info_of

    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.add_column("", style=MUTED, overflow="fold")
    for name in (f"A: {one_line(a, 30)}", f"B: {one_line(b, 30)}", "B − A, 95 %"):
        table.add_column(name, justify="right", overflow="fold")
    for key, differs in measures.items():
        info = info_of(key)
        colour = {"better": BETTER, "worse": WORSE}.get(info.verdict(differs.as_change()), MUTED)
        between = Text(info.difference(differs.b_minus_a), style=colour)
        table.add_row(info.label, info.text(differs.a), info.text(differs.b), between)
    return table


def row_words(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What happened to one row: bad → good where good is right, or the loss of both."""
    from tunesmith.cli.text import loss, one_line

    text = one_line(str(now.get("text", "")), 60)
    if "label" in now:
        told = f"{_named(was['predicted'])} → {_named(now['predicted'])}, right is {_named(now['label'])}"
    elif "value" in now:
        told = f"{was['predicted']:g} → {now['predicted']:g}, right is {now['value']:g}"
    elif "tags" in now:
        hits = [
            sum(tag == found for tag, found in zip(row["tags"], row["predicted"], strict=True)) for row in (was, now)
        ]
        told = f"{hits[0]} → {hits[1]} of {len(now['tags'])} words right"
    else:
        told = f"loss {loss(was['loss'] / was['count'])} → {loss(now['loss'] / now['count'])}"
    return f"{told}: {text}" if text else told


def _named(label: str | Sequence[str]) -> str:
    return label if isinstance(label, str) else " + ".join(label) or "none"
