"""Measures with their intervals in words and as a table, by what `METRICS` says of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from tunesmith.cli.story import Story, measures_of
from tunesmith.evaluation.metrics import VERDICTS, info_of
from tunesmith.formatting import plural
from tunesmith.types import Event

if TYPE_CHECKING:
    from tunesmith.evaluation.bootstrap import Interval
    from tunesmith.evaluation.report.text import MetricLine

MUTED = "bright_black"
BETTER, WORSE = "green", "red"
GIST = ("accuracy", "macro_f1", "micro_f1", "span_f1", "spearman", "rougeL", "token_accuracy")
"""Of one of these a list of runs tells, the first that was measured."""


def score_line(event: Event, story: Story | None = None) -> str:
    """An "evaluation", "answers" or "general" event in one line; of a new head before its training the loss alone."""
    values = event.values
    if story is not None and story.has_new_head and values["name"] == "before":
        loss = info_of("loss").text(values["loss"])
        return f"loss {loss} ({_rested_on(event.kind, values)}; the head is new and answers at random)"
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
    info = info_of(key)
    value, ends = info.text(interval["value"]), info.bounds(interval)
    return f"{value} ({ends})" if ends else value


def measures_table(measures: Mapping[str, Interval], *, title: str) -> Table:
    """A row for each measure of one model."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False, show_header=False)
    table.title, table.title_style, table.title_justify = title, MUTED, "left"
    table.add_column(style=MUTED, overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for key, interval in measures.items():
        table.add_row(info_of(key).label, _cell(key, interval, "bold"))
    return table


def score_table(lines: Sequence[MetricLine], *, title: str, columns: tuple[str, str]) -> Table:
    """A row for each measure of a report: what it is compared with, if anything, the result, and the paired change."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", show_edge=False)
    table.title, table.title_style, table.title_justify = title, MUTED, "left"
    table.add_column("", style=MUTED, overflow="fold")
    for name in filter(None, columns):
        table.add_column(name, justify="right", overflow="fold")
    if columns[0]:
        table.add_column("difference", justify="right", overflow="fold")
    for line in lines:
        other, after = _ends(line.other, line.other_bounds, ""), _ends(line.after, line.after_bounds, "bold")
        words = ", ".join(filter(None, [line.change, VERDICTS[line.verdict]]))
        change = Text(words, style={"better": BETTER, "worse": WORSE}.get(line.verdict, MUTED))
        table.add_row(line.label, *((other, after, change) if columns[0] else (after,)))
    return table


def _cell(key: str, interval: Interval, style: str) -> Text:
    info = info_of(key)
    return _ends(info.text(interval["value"]), info.bounds(interval), style)


def _ends(value: str, ends: str, style: str) -> Text:
    text = Text(value, style=style)
    return text.append(f" {ends}", style=f"not bold {MUTED}") if ends else text


def score_lines(lines: Sequence[MetricLine], columns: tuple[str, str]) -> Iterator[str]:
    """The same as whole lines."""
    for line in lines:
        after = f"{line.after} ({line.after_bounds})" if line.after_bounds else line.after
        if not columns[0] or line.other == "–":
            yield f"{line.label}: {after}"
            continue
        other = f"{line.other} ({line.other_bounds})" if line.other_bounds else line.other
        words = ", ".join(filter(None, [line.change, VERDICTS[line.verdict]]))
        yield f"{line.label}: {columns[0]} {other}, {columns[1]} {after}" + (f"; difference {words}" if words else "")


def gist(before: Mapping[str, Interval], after: Mapping[str, Interval]) -> str:
    """The measure that says most, before and after, or beside that of the majority baseline; "" if there is none."""
    key = next((key for key in GIST if key in after and (key in before or not before)), None)
    if key is None:
        return ""
    info = info_of(key)
    if key in before:
        return f"{info.label} {info.text(before[key]['value'])} → {info.text(after[key]['value'])}"
    usual = after.get("majority") if key == "accuracy" else None
    beside = f" (majority {info.text(usual['value'])})" if usual else ""
    return f"{info.label} {info.text(after[key]['value'])}{beside}"
