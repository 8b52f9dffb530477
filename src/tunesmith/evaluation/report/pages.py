"""The page of a report as HTML that loads nothing, and as Markdown for a terminal, a code host or a mail."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunesmith.evaluation.report import sections as s
from tunesmith.evaluation.report.build import MOST_LISTED
from tunesmith.evaluation.report.sections import Page
from tunesmith.evaluation.report.text import mark, one_line, visible

FOLDED_FROM = 600
"""Characters from which a text is folded to its beginning."""
_IN_A_LINE = 40
"""Characters that a line break counts as."""
MOST_CHARACTERS = 20_000
"""Most characters of one text; the rest is cut, which the page says. The run's own files have it."""


def as_html(page: Page) -> str:
    """The page as HTML. Every value that is put in goes through `visible` and is escaped, unless it is Markup."""

    def shown(value: Any) -> Any:
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=shown
    )
    environment.filters |= {"data": data, "line": one_line, "name": _name}
    environment.filters["day"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    environment.globals |= {"svg": lambda plot: Markup(plot.svg), "mark_of": mark}
    here = files(__package__ or "")
    template = environment.from_string(here.joinpath("report.html.jinja").read_text("utf-8"))
    style = Markup(here.joinpath("report.css").read_text("utf-8"))
    return template.render(page=page, report=page.report, style=style)


def data(text: Any, folded_from: int = FOLDED_FROM) -> Markup:
    """A text of the data, set apart from the page's own; longer ones than `folded_from` are folded."""
    shown = visible(str(text))
    cut = len(shown) - MOST_CHARACTERS
    if cut > 0:
        shown = f"{shown[:MOST_CHARACTERS]}… ({cut:,} more characters are left out)"
    whole = Markup("<bdi>{}</bdi>").format(shown)
    if len(shown) < folded_from and shown.count("\n") < folded_from / _IN_A_LINE:
        return whole
    summary = Markup("<summary><bdi>{}</bdi> <small>{:,} characters</small></summary>")
    return Markup("<details>{}{}</details>").format(summary.format(one_line(shown, 160), len(shown)), whole)


def _name(label: str) -> Markup:
    """A class, tag or number, cut where it is longer than any name should be."""
    return Markup("<bdi>{}</bdi>").format(one_line(label, 80))


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
            numbers = [column.kind in ("number", "result") for column in block.columns]
            rows = [list(map(_cell, row)) for row in block.rows[:MOST_LISTED]]
            yield from _table([column.title for column in block.columns], rows, numbers)
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
