"""The page of a report as HTML that loads nothing."""

from __future__ import annotations

import time
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunesmith.evaluation.report.sections import Page
from tunesmith.evaluation.report.text import mark
from tunesmith.phrases import one_line, visible

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
