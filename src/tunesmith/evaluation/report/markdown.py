"""report.md: the page without its plots, for a terminal, a code host or a mail."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tunesmith.evaluation.report import sections as s
from tunesmith.evaluation.report.build import MOST_LISTED
from tunesmith.evaluation.report.text import mark, one_line, visible

_MEANT = re.compile(r"([\\`*_\[\]<>|&~$#])")
_MARKS = {"right": " ✓", "wrong": " ✗"}


def as_markdown(page: s.Page) -> str:
    """The page as Markdown in which no text of the data has a meaning."""
    lines = [f"# {inline(page.report['name'])}", "", inline(page.summary, width=100_000)]
    for section in page.sections:
        blocks = [line for block in section.blocks for line in _lines(block)]
        lines += ["", f"## {section.title}", *blocks] if blocks else []
    return "\n".join(lines) + "\n"


def inline(text: Any, *, width: int = 160) -> str:
    """The text on one line, at most `width` characters, every character of Markdown escaped."""
    return _MEANT.sub(r"\\\1", one_line(str(text), width))


def _lines(block: s.Block) -> Iterator[str]:
    match block:
        case s.Paragraph() | s.Heading():
            yield from ("", f"{'### ' if block.kind == 'heading' else ''}{inline(block.text, width=2000)}")
        case s.Items():
            yield from ("", *(f"- {inline(item, width=2000)}" for item in block.items))
        case s.FactList():
            yield from _table(["", ""], [[inline(name), inline(fact, width=400)] for name, fact in block.facts])
        case s.Code():
            yield from ("", fenced("", block.text))
        case s.SampleAnswers():
            for sample in block.samples:
                yield from ("", *_answers(sample), "---")
        case s.Fold():
            yield from ("", f"{inline(block.summary)}:", *(line for inner in block.blocks for line in _lines(inner)))
        case s.Table():
            places = [i for i, column in enumerate(block.columns) if column.kind != "whiskers"]
            numbers = [block.columns[i].kind in ("number", "result") for i in places]
            rows = [[_cell(row[i]) for i in places] for row in block.rows[:MOST_LISTED]]
            yield from _table([block.columns[i].title for i in places], rows, numbers)
            if len(block.rows) > MOST_LISTED:
                yield from ("", f"{len(block.rows) - MOST_LISTED:,} more are in report.html.")


def _cell(cell: s.Cell) -> str:
    note = f" ({cell.note})" if cell.note else ""
    return f"{inline(cell.text)}{note}{_MARKS.get(cell.mark, '')}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool] = ()) -> Iterator[str]:
    if rows:
        rule = [" ---: |" if i < len(numbers) and numbers[i] else " --- |" for i in range(len(head))]
        yield from ("", f"| {' | '.join(head)} |", f"|{''.join(rule)}", *(f"| {' | '.join(row)} |" for row in rows))


def _answers(sample: Mapping[str, Any]) -> Iterator[str]:
    for key in ("prompt", "reference", "before", "after"):
        if sample.get(key):
            sign = _MARKS.get(mark(sample[key], sample.get("reference")), "") if key in ("before", "after") else ""
            yield fenced(f"{key.capitalize()}{sign}", sample[key])


def fenced(title: str, text: str) -> str:
    """Text of a row as text: a fence longer than any inside it, so that no row can write into the report."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return (f"{title}:\n\n" if title else "") + f"{fence}text\n{visible(text)}\n{fence}\n"
