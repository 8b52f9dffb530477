"""The trial of a grader as an HTML page that looks like a run's report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tunesmith.environment.version import __version__
from tunesmith.evaluation.report.pages import as_html
from tunesmith.evaluation.report.plots import ACCENT, PAPER, Plot, draw
from tunesmith.evaluation.report.sections import Block, Cell, Column, Page, PageSection, Table
from tunesmith.graders.grade import FAILURES
from tunesmith.graders.trial import PLAYED
from tunesmith.graders.verdict import Verdict, lines_of
from tunesmith.phrases import plural
from tunesmith.types import REWARD_KEY, JsonObject, Record


def page_of(values: Record, verdicts: Sequence[Verdict], *, grader: str, data: str) -> str:
    """`trial.results` and the verdicts as one HTML file that loads nothing else."""
    report = {
        "name": grader,
        "task": "grader",
        "method": plural(values["grades"], "grade"),
        "versions": {"tunesmith": __version__},
    }
    summary = f"Tried on {plural(values['rows'], 'row')} of {data}."
    is_odd = values["errors"] or values["left_out"]
    sections = [
        PageSection(
            "verdict",
            "Verdict",
            [Block("warning" if entry.refuses else "paragraph", entry.words) for entry in verdicts],
        ),
        PageSection("rewards", "Rewards", list(_rewards(values))),
        PageSection("errors", "Grades that failed", [_errors(values)] if is_odd else []),
        *(PageSection(name, f"The {name} answers", [_answers(values[name])]) for name in ("best", "worst")),
    ]
    return as_html(Page(report, time.time(), summary, [entry for entry in sections if entry.blocks]))


def _rewards(values: Record) -> Iterator[Block | Table]:
    rows = [[Cell(what), Cell(value, bounds)] for what, value, bounds, _ in lines_of(values)]
    yield Table([Column("of"), Column("value, with its 95 % interval", "number")], rows)
    scored = {kind: entry for kind, entry in values["kinds"].items() if entry["scored"]}
    yield Block("figures", [_histogram(kind, entry) for kind, entry in scored.items()])


def _histogram(kind: str, entry: Record) -> Plot:
    def paint(axes: Any) -> None:
        edges = np.array(entry["edges"])
        look: JsonObject = {"color": ACCENT, "alpha": 0.55, "edgecolor": PAPER}
        axes.bar(edges[:-1], entry["counts"], width=np.diff(edges), align="edge", **look)
        axes.set(xlabel="reward of an answer", ylabel="answers")
        axes.grid(visible=False, axis="x")

    title = PLAYED[kind][0].upper() + PLAYED[kind][1:]
    return draw(f"rewards-{kind}", title, f"{plural(entry['scored'], 'answer')} by reward.", paint, height=180)


def _errors(values: Record) -> Table:
    rows = [
        [Cell(FAILURES[entry["kind"]]), Cell(first["source"]), Cell(PLAYED[first["of"]]), Cell(first["error"])]
        for entry in values["errors"]
        for first in entry["first"]
    ]
    rows += [
        [
            Cell(f"score {entry['name']}: no finite number, {plural(entry['num'], 'time')}"),
            Cell(entry["source"]),
            Cell(PLAYED[entry["of"]]),
            Cell(entry["value"]),
        ]
        for entry in values["left_out"]
    ]
    return Table([Column("kind"), Column("row", "source"), Column("answer"), Column("error")], rows)


def _answers(answers: Sequence[Record]) -> Table:
    texts = ("prompt", "answer", "reference")
    columns = [Column("row", "source"), Column(REWARD_KEY, "number"), *map(Column, texts)]
    rows = [
        [Cell(entry["source"]), Cell(f"{entry[REWARD_KEY]:.3g}"), *(Cell(entry[key] or "") for key in texts)]
        for entry in answers
    ]
    return Table(columns, rows)
