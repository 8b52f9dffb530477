"""Measures with their intervals in words and as a table, by what `MEASURES` says of each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tunesmith.cli.story import measures_of
from tunesmith.measures import MEASURES, MeasureInfo
from tunesmith.types import Event
from tunesmith.values import plural

if TYPE_CHECKING:
    from tunesmith.evaluation.intervals import Interval

MUTED = "bright_black"
BETTER, WORSE = "green", "red"
GIST = ("accuracy", "macro_f1", "micro_f1", "span_f1", "spearman", "rougeL", "token_accuracy")
"""Of one of these a list of runs tells, the first that was measured."""


def info_of(key: str) -> MeasureInfo:
    """What is known of a measure; one of a newer version is shown under its key."""
    return MEASURES.get(key) or MeasureInfo(key, "number", "neither", "")


def score_line(event: Event) -> str:
    """An "evaluation", "answers" or "general" event in one line."""
    values = event.values
    told = [
        f"{info_of(key).label.removeprefix('held-out ')} {info_of(key).text(interval['value'])}"
        for key, interval in measures_of(event).items()
    ]
    return f"{', '.join(told)} ({_rested_on(event.kind, values)})"


def _rested_on(kind: str, values: Mapping[str, Any]) -> str:
    if kind == "answers":
        return plural(values["num"], "answer")
    if kind == "general":
        return f"{values['tokens']:,} tokens"
    return rows_and_targets(values)


def rows_and_targets(values: Mapping[str, Any]) -> str:
    """What an evaluation counted: 60 rows, 1,234 targets; or 9 documents in 60 windows, 1,234 targets."""
    rows = plural(values["rows"], "row")
    if "documents" in values:
        rows = f"{plural(values['documents'], 'document')} in {plural(values['rows'], 'window')}"
    return rows if values["targets"] == values["rows"] else f"{rows}, {values['targets']:,.0f} targets"


def with_bounds(key: str, interval: Interval) -> str:
    """A value and its 95 % interval: 71.2% (69.0–73.1)."""
    value = info_of(key).text(interval["value"])
    return f"{value} ({bounds(key, interval)})" if bounds(key, interval) else value


def bounds(key: str, interval: Interval) -> str:
    """The ends of an interval, in fewer digits than its value; nothing where there is none."""
    low, high = interval["low"], interval["high"]
    if not low < high:  # there is none, or it is a point
        return ""
    form = info_of(key).form
    if form == "percent":
        return f"{low * 100:.1f}–{high * 100:.1f}"
    return f"{low:.2f}–{high:.2f}" if form == "ratio" else f"{low:.3f}–{high:.3f}"


def change(key: str, before: Interval, after: Interval) -> tuple[str, str]:
    """The difference as it is printed, and its colour: green or red only where the two intervals lie apart."""
    info, difference = info_of(key), after["value"] - before["value"]
    if math.isnan(difference) or (info.better == "neither" and difference == 0):
        return "", MUTED
    if info.form == "percent":
        text = f"{difference * 100:+.1f} points"
    elif info.better == "lower" and before["value"] > 0:
        text = f"{difference / before['value']:+.0%}"
    else:
        text = f"{difference:+.2f}" if info.form == "ratio" else f"{difference:+.4f}"
    if info.better == "neither" or not _lie_apart(before, after):
        return text, MUTED
    return text, BETTER if (difference < 0) == (info.better == "lower") else WORSE


def _lie_apart(one: Interval, other: Interval) -> bool:
    return one["high"] < other["low"] or other["high"] < one["low"]


def difference(key: str, interval: Interval) -> str:
    """A difference of two values of a measure with its interval: +3.2 (+1.0 to +5.1) points."""
    form = info_of(key).form
    scale, digits, unit = (100.0, 1, " points") if form == "percent" else (1.0, 2 if form == "ratio" else 4, "")
    value, low, high = (f"{end * scale:+.{digits}f}" for end in (interval["value"], interval["low"], interval["high"]))
    return f"{value} ({low} to {high}){unit}"


def measures_table(measures: Mapping[str, Interval], *, title: str) -> Table:
    """A row for each measure of one model."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, show_header=False)
    table.title, table.title_style, table.title_justify = title, MUTED, "left"
    table.add_column(style=MUTED, overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for key, interval in measures.items():
        table.add_row(info_of(key).label, _cell(key, interval, "bold"))
    return table


def score_table(
    before: Mapping[str, Interval], after: Mapping[str, Interval], *, title: str, names: tuple[str, str]
) -> Table:
    """A row for each measure that both have: two values with their 95 % intervals, and the change."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.title, table.title_style, table.title_justify = title, MUTED, "left"
    table.add_column("", style=MUTED, overflow="fold")
    table.add_column(names[0], justify="right", overflow="fold")
    table.add_column(names[1], justify="right", overflow="fold")
    table.add_column("change", justify="right")
    for key in (key for key in before if key in after):
        text, colour = change(key, before[key], after[key])
        cells = (_cell(key, before[key], ""), _cell(key, after[key], "bold"))
        table.add_row(info_of(key).label, *cells, Text(text, style=colour))
    return table


def _cell(key: str, interval: Interval, style: str) -> Text:
    text = Text(info_of(key).text(interval["value"]), style=style)
    ends = bounds(key, interval)
    return text.append(f" {ends}", style=f"not bold {MUTED}") if ends else text


def score_lines(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> Iterator[str]:
    """The same as whole lines."""
    for key in (key for key in before if key in after):
        yield f"{info_of(key).label} {with_bounds(key, before[key])} before, {with_bounds(key, after[key])} after"


def gist(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> str:
    """The one measure that says most beside the loss, before and after; "" where there is none."""
    key = next((key for key in GIST if key in before and key in after), None)
    if key is None:
        return ""
    info = info_of(key)
    return f"{info.label} {info.text(before[key]['value'])} → {info.text(after[key]['value'])}"
