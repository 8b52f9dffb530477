"""report.md: the report without pictures, for a terminal, a code host or a mail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.evaluation.metrics import VERDICTS
from tunesmith.evaluation.report import wording
from tunesmith.evaluation.report.held_out import MOST_LISTED, label_text, target_of
from tunesmith.evaluation.report.marking import one_line, visible
from tunesmith.formatting import option, plural

_MEANT = re.compile(r"([\\`*_\[\]<>|&~$#])")
_IN_A_CELL = 160


def as_markdown(page: Mapping[str, Any]) -> str:
    """The same `page` as report.html is made of."""
    report = page["report"]
    lines = [f"# {inline(report['name'])}", "", inline(page["summary"], width=100_000)]
    for title, part in (
        ("Measures", _measures(page)),
        ("Worth knowing", [f"- {inline(note, width=2000)}" for note in page["notes"]]),
        ("Training", _training(page)),
        ("Classes", _classes(page)),
        ("Answers", _short_answers(report) if report.get("short_answers") else _answers(report["samples"])),
        ("Rows that flipped", _flips(report)),
        ("Rows that got worse", _worse(report["worse_rows"])),
        ("Surprising training rows", _surprising(report)),
        ("General ability", _general(report["general"])),
        ("Choices", _choices(page["choices"])),
        ("Repeat", _repeat(page)),
    ):
        body = list(part)
        if body:
            lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def inline(text: Any, *, width: int = _IN_A_CELL) -> str:
    """Text of the data or of a person in a line of Markdown, where none of it means anything."""
    return _MEANT.sub(r"\\\1", one_line(str(text), width))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> Iterator[str]:
    if rows:
        yield f"| {' | '.join(head)} |"
        yield f"|{'|'.join('---:' if i in numbers else '---' for i in range(len(head)))}|"
        yield from (f"| {' | '.join(row)} |" for row in rows)


def _measures(page: Mapping[str, Any]) -> Iterator[str]:
    report, lines = page["report"], page["lines"]
    other, ours = wording.sides(report)
    if other:
        rows = [
            [
                inline(line.label),
                wording.with_bounds(line.other, line.other_bounds),
                wording.with_bounds(line.after, line.after_bounds),
                line.change,
                VERDICTS[line.verdict],
            ]
            for line in lines
        ]
        yield from _table(["measure", other, ours, "difference", ""], rows, numbers=(1, 2, 3))
    else:
        rows = [[inline(line.label), wording.with_bounds(line.after, line.after_bounds)] for line in lines]
        yield from _table(["measure", ours], rows, numbers=(1,))
    if rows:
        yield from ("", f"{wording.basis(report)} {wording.reading(report)}")


def _training(page: Mapping[str, Any]) -> Iterator[str]:
    yield inline(page["kept"], width=2000)
    yield ""
    yield inline(page["effort"], width=2000)


def _classes(page: Mapping[str, Any]) -> Iterator[str]:
    details = page["report"]["details"]["after"]
    rows = details.get("per_class") or details.get("per_type") or []
    cells = [
        [
            inline(row.get("label", row.get("type"))),
            *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
            f"{row['support']:,}",
        ]
        for row in rows
    ]
    yield from _table(["", "precision", "recall", "F1", "rows"], cells, numbers=(1, 2, 3, 4))
    pairs = [[inline(true), inline(taken), str(rows), f"{share:.0%}"] for true, taken, rows, share in page["pairs"]]
    if pairs:
        yield ""
        yield from _table(["true", "taken for", "rows", "of its rows"], pairs, numbers=(2, 3))


def _answers(samples: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for sample in samples:
        for title in ("prompt", "reference", "before", "after"):
            if sample.get(title):
                yield _fenced(f"{title.capitalize()}{_mark(sample, title)}", sample[title])
        yield "---"


def _mark(sample: Mapping[str, Any], when: str) -> str:
    found = (
        wording.mark(sample[when], sample.get("reference")) if when in ("before", "after") and when in sample else ""
    )
    return {"right": " ✓", "wrong": " ✗"}.get(found, "")


def _short_answers(report: Mapping[str, Any]) -> Iterator[str]:
    yield "✓ is equal to the reference, ✗ is not."
    yield ""
    samples = report["samples"]
    cells = [
        [
            *(inline(sample[key]) for key in ("source", "prompt", "reference")),
            *(f"{inline(sample.get(when, ''))}{_mark(sample, when)}" for when in ("before", "after")),
        ]
        for sample in samples[:MOST_LISTED]
    ]
    yield from _table(["row", "prompt", "reference", "before", "after"], cells)
    if len(samples) > MOST_LISTED:
        yield f"\n{len(samples) - MOST_LISTED:,} more are in evaluation/answers-after.jsonl."


def _flips(report: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (("lost", "from right to wrong"), ("gained", "from wrong to right")):
        if report["flips"] is not None:
            yield f"{plural(report['flips'][f'num_{key}'], 'row')} went {words}."
            yield ""
            columns = ("source", "text", "label", "before", "after")
            rows = [[inline(row[column]) for column in columns] for row in report["flips"][key]]
            yield from _table(["row", "text", "true", "before", "after"], rows)
            yield ""


def _worse(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    cells = [
        [inline(row["source"]), inline(row["text"]), f"{row['before']:.4f}", f"{row['after']:.4f}"] for row in rows
    ]
    yield from _table(["row", "text", "loss before", "after"], cells, numbers=(2, 3))


def _surprising(report: Mapping[str, Any]) -> Iterator[str]:
    rows = report["surprising"]["rows"]
    if rows:
        yield from (wording.looked_at(report), "")
    cells = [
        [
            inline(row["source"]),
            inline(row["text"]),
            inline(label_text(target_of(row))),
            inline(label_text(row.get("predicted", ""))),
            f"{row['loss'] / row['count']:.2f}",
        ]
        for row in rows
    ]
    yield from _table(["row", "text", "label", "model says", "loss"], cells, numbers=(4,))


def _general(general: Mapping[str, Any] | None) -> Iterator[str]:
    if general is not None:
        yield inline(general["verdict"], width=2000)
        yield ""
        yield from _answers(general["answers"])


def _choices(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [[inline(c["key"]), inline(option(c["value"])), inline(c["reason"], width=400)] for c in choices]
    yield from _table(["option", "value", "why"], rows)


def _repeat(page: Mapping[str, Any]) -> Iterator[str]:
    yield _fenced("", page["command"])
    rows = [
        [inline(name), inline(text)] for name, text in (*page["report"]["versions"].items(), *page["hashes"].items())
    ]
    yield from _table(["", ""], rows)
    yield ""
    yield _fenced("Recipe", page["recipe"])


def _fenced(title: str, text: str) -> str:
    """Text of a row as text: a fence longer than any inside it, so that no row can write into the report."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return (f"{title}:\n\n" if title else "") + f"{fence}text\n{visible(text)}\n{fence}\n"
