"""report.html: one file that asks nobody for anything."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunesmith.evaluation.report import wording
from tunesmith.evaluation.report.figure import Plot
from tunesmith.evaluation.report.held_out import label_text, target_of
from tunesmith.evaluation.report.marking import Marked, differences, one_line, visible
from tunesmith.formatting import option, plural

_SECTION = re.compile(r'<section id="(\w+)"><h2>([^<]+)</h2>')
FOLDED_FROM = 600
"""Characters from which a text is folded to its beginning."""
_IN_A_LINE = 40
"""Characters that a line break counts as."""
MOST_CHARACTERS = 20_000
"""Of one text; beyond it is cut, and it is said. The run's own files have the rest."""


def as_html(page: Mapping[str, Any], training: list[Plot], answers: list[Plot], lengths: list[Plot]) -> str:
    """The page. `page` is what every form of the report is made of: see `report.write_report`.

    Every value that is put in goes through `visible` and is escaped, unless it is Markup made here.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_put_in
    )
    environment.filters |= {
        "data": data,
        "day": _day,
        "label": label_text,
        "option": option,
        "line": one_line,
        "name": _name,
    }
    environment.globals |= {"w": wording, "plural": plural, "svg": _svg, "answers_of": _answers_of, "target": target_of}
    here = files(__package__ or "")
    template = environment.from_string(here.joinpath("report.html.jinja").read_text("utf-8"))
    style = Markup(here.joinpath("report.css").read_text("utf-8"))
    plots = {"training": training, "answers": answers, "lengths": lengths}
    html = template.render(**page, plots=plots, style=style)
    links = [f'<a href="#{name}">{title}</a>' for name, title in _SECTION.findall(html)]
    return html.replace("<nav></nav>", f"<nav>{''.join(links)}</nav>", 1)


def _put_in(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _svg(plot: Plot) -> Markup:
    return Markup(plot.svg)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def data(text: Any, folded_from: int = FOLDED_FROM) -> Markup:
    """A text of the data, set apart from the page's own; longer ones than `folded_from` are folded."""
    shown = visible(str(text))
    cut = len(shown) - MOST_CHARACTERS
    if cut > 0:
        shown = f"{shown[:MOST_CHARACTERS]}… ({cut:,} more characters are left out)"
    return _folded(shown, Markup("<bdi>{}</bdi>").format(shown), folded_from)


def _name(label: str) -> Markup:
    """A class, tag or number: its beginning, where somebody made it a novel."""
    return Markup("<bdi>{}</bdi>").format(one_line(label, 80))


def _folded(text: str, whole: Markup, folded_from: int) -> Markup:
    if len(text) < folded_from and text.count("\n") < folded_from / _IN_A_LINE:
        return whole
    begin = one_line(text, 160)
    summary = Markup("<summary><bdi>{}</bdi> <small>{:,} characters</small></summary>").format(begin, len(text))
    return Markup("<details>{}{}</details>").format(summary, whole)


def _answers_of(sample: Mapping[str, Any]) -> tuple[Markup, Markup, bool]:
    """Both answers with their differences marked, and whether they could be."""
    before, after = sample.get("before", ""), sample.get("after", "")  # a log may have lost one
    found = differences(before, after)
    if found is None:
        return data(before), data(after), False
    return _marked(found[0], "del"), _marked(found[1], "ins"), True


def _marked(stretches: Marked, tag: str) -> Markup:
    pieces = [
        Markup(f"<{tag}>{{}}</{tag}>").format(visible(text)) if marked else Markup("{}").format(visible(text))
        for text, marked in stretches
    ]
    text = visible("".join(text for text, _ in stretches))
    return _folded(text, Markup("<bdi>{}</bdi>").format(Markup("").join(pieces)), FOLDED_FROM)
