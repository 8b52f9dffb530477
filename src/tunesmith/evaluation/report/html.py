"""report.html: the page as one file that loads nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunesmith.evaluation.report.sections import Page
from tunesmith.evaluation.report.text import Marked, differences, mark, one_line, visible

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
    environment.globals |= {"svg": lambda plot: Markup(plot.svg), "answers_of": _answers_of, "mark_of": mark}
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
    return _folded(shown, Markup("<bdi>{}</bdi>").format(shown), folded_from)


def _name(label: str) -> Markup:
    """A class, tag or number, cut where it is longer than any name should be."""
    return Markup("<bdi>{}</bdi>").format(one_line(label, 80))


def _folded(text: str, whole: Markup, folded_from: int) -> Markup:
    if len(text) < folded_from and text.count("\n") < folded_from / _IN_A_LINE:
        return whole
    summary = Markup("<summary><bdi>{}</bdi> <small>{:,} characters</small></summary>").format(
        one_line(text, 160), len(text)
    )
    return Markup("<details>{}{}</details>").format(summary, whole)


def _answers_of(sample: Mapping[str, Any]) -> tuple[Markup, Markup, bool]:
    """Both answers with their differences marked, and whether they could be."""
    before, after = sample.get("before", ""), sample.get("after", "")  # a log may have lost one
    found = differences(before, after)
    if found is None:
        return data(before), data(after), False
    return _marked(found[0], "del"), _marked(found[1], "ins"), True


def _marked(spans: Marked, tag: str) -> Markup:
    wraps = {True: Markup(f"<{tag}>{{}}</{tag}>"), False: Markup("{}")}
    pieces = [wraps[marked].format(visible(text)) for text, marked in spans]
    text = visible("".join(text for text, _ in spans))
    return _folded(text, Markup("<bdi>{}</bdi>").format(Markup("").join(pieces)), FOLDED_FROM)
