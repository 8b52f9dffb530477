"""The page of a report as HTML that loads nothing, and as Markdown for a terminal, a code host or a mail."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from tunesmith.evaluation.report.sections import Block, Cell, Page, Table
from tunesmith.evaluation.report.values import MOST_ROWS_LISTED, mark
from tunesmith.phrases import one_line, visible

_HERE = files(__package__ or "")
FOLDED_FROM = 600
"""Characters from which a text is folded to its beginning."""
_IN_A_LINE = 40
"""Characters that a line break counts as."""
MOST_CHARACTERS = 20_000
"""Most characters of one text; the rest is cut, which the page says. The run's own files have it."""


def as_html(page: Page) -> str:
    """The page as HTML. Every value put into it goes through `visible` and is escaped, unless it is Markup."""
    style = Markup(_HERE.joinpath("report.css").read_text("utf-8"))
    return _environment().get_template("report.html.jinja").render(page=page, report=page.report, style=style)


def block_template(address_of: Callable[[str], str]) -> Template:
    """The template whose macro `draw` sets a block of a section. `address_of`: where the row of a source
    is shown, or "" if it is nowhere."""
    environment = _environment()
    environment.globals["address_of"] = address_of
    return environment.get_template("blocks.html.jinja")


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.loader, environment.finalize = FileSystemLoader(str(_HERE)), _shown
    environment.filters |= {"data": data, "prose": prose, "line": one_line, "name": _name}
    environment.filters["day"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
    environment.globals |= {"svg": lambda plot: Markup(plot.svg), "mark_of": mark, "address_of": lambda source: ""}
    return environment


def _shown(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def data(text: Any, folded_from: int = FOLDED_FROM) -> Markup:
    """A text of the data, set apart from the page's own; longer ones than `folded_from` are folded."""
    shown = visible(str(text))
    cut = len(shown) - MOST_CHARACTERS
    if cut > 0:
        shown = f"{shown[:MOST_CHARACTERS]}… ({cut:,} more characters are left out)"
    shown_whole = Markup("<bdi>{}</bdi>").format(shown)
    if len(shown) < folded_from and shown.count("\n") < folded_from / _IN_A_LINE:
        return shown_whole
    summary = Markup("<summary><bdi>{}</bdi> <small>{:,} characters</small></summary>")
    return Markup("<details>{}{}</details>").format(summary.format(one_line(shown, 160), len(shown)), shown_whole)


def prose(text: str) -> Markup:
    """A sentence of the page, what it has in backticks as code; one too long is folded."""
    parts = visible(text).split("`")
    if len(text) >= 2 * FOLDED_FROM or len(parts) % 2 == 0:
        return data(text)
    code = Markup("<code><bdi>{}</bdi></code>")
    return Markup("").join(code.format(part) if i % 2 else part for i, part in enumerate(parts))


def _name(label: str) -> Markup:
    """A class, tag or number, cut where it is longer than any name should be."""
    return Markup("<bdi>{}</bdi>").format(one_line(label, 80))


_MEANT = re.compile(r"([\\`*_\[\]<>|&~$#])")
_MARKS = {"right": " ✓", "wrong": " ✗"}


def as_markdown(page: Page) -> str:
    """The page as Markdown, without plots, in which no text of the data has a meaning."""
    lines = [f"# {inline(page.report['name'])}", "", inline(page.summary)]
    for section in page.sections:
        blocks = [line for block in section.blocks for line in _lines(block)]
        lines += ["", f"## {section.title}", *blocks] if blocks else []
    return "\n".join(lines) + "\n"


def inline(text: Any, width: int = 2000) -> str:
    """The text on one line, at most `width` characters, every character of Markdown escaped."""
    return _MEANT.sub(r"\\\1", one_line(str(text), width))


def _lines(block: Block | Table) -> Iterator[str]:
    if isinstance(block, Table):
        yield from (
            "",
            f"| {' | '.join(inline(column.title) for column in block.columns)} |",
            "|" + " --- |" * len(block.columns),
        )
        yield from (f"| {' | '.join(map(_cell, row))} |" for row in block.rows[:MOST_ROWS_LISTED])
        if len(block.rows) > MOST_ROWS_LISTED:
            yield from ("", f"{len(block.rows) - MOST_ROWS_LISTED:,} more are in report.html.")
        return
    if block.fold:
        yield from ("", f"{block.fold}:")
    match block.kind:
        case "paragraph" | "warning" | "heading":
            yield from ("", f"{'### ' if block.kind == 'heading' else ''}{inline(block.content)}")
        case "items":
            yield from ("", *(f"- {inline(item)}" for item in block.content))
        case "facts":
            yield from ("", *(f"- {inline(name)}: {inline(fact)}" for name, fact in block.content))
        case "code":
            yield from ("", fenced(block.content))
        case "answers":
            for sample in block.content:
                for key in ("prompt", "reference", "before", "after"):
                    if sample.get(key):
                        is_answer = key in ("before", "after")
                        sign = _MARKS.get(mark(sample[key], sample.get("reference")), "") if is_answer else ""
                        yield from ("", f"{key.capitalize()}{sign}:", "", fenced(sample[key]))
                yield from ("", "---")


def _cell(cell: Cell) -> str:
    return f"{inline(cell.text, 160)}{f' ({cell.note})' if cell.note else ''}{_MARKS.get(cell.mark, '')}"


def fenced(text: str) -> str:
    """Text of a row as text: a fence longer than any inside it, so that no row can write into the report."""
    fence = "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}text\n{visible(text)}\n{fence}"
