"""The trial of a grader as a page, in the looks of a run's report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tunesmith.evaluation.report.pages import as_html
from tunesmith.evaluation.report.plots import ACCENT, PAPER, Plot, draw
from tunesmith.evaluation.report.sections import Block, Cell, Column, Page, PageSection, Table
from tunesmith.graders.grade import KINDS
from tunesmith.graders.trial import PLAYED
from tunesmith.graders.verdict import Verdict, lines_of
from tunesmith.phrases import plural
from tunesmith.version import __version__


def page_of(found: Mapping[str, Any], verdicts: Sequence[Verdict], *, grader: str, data: str) -> str:
    """HTML of `trial.results` that loads nothing."""
    report = {
        "name": grader,
        "task": "grader",
        "method": plural(found["grades"], "grade"),
        "versions": {"tunesmith": __version__},
    }
    summary = f"Tried on {plural(found['rows'], 'row')} of {data}."
    sections = [
        PageSection(
            "verdict", "Verdict", [Block("warning" if one.refuses else "paragraph", one.words) for one in verdicts]
        ),
        PageSection("rewards", "Rewards", list(_rewards(found))),
        PageSection("errors", "Grades that failed", [_errors(found)] if found["errors"] else []),
        *(PageSection(name, f"The {name} answers", [_answers(found[name])]) for name in ("best", "worst")),
    ]
    return as_html(Page(report, time.time(), summary, [one for one in sections if one.blocks]))


def _rewards(found: Mapping[str, Any]) -> Iterator[Block | Table]:
    rows = [[Cell(what), Cell(value, bounds)] for what, value, bounds, _ in lines_of(found)]
    yield Table([Column("of"), Column("value, with its 95 % interval", "number")], rows)
    yield Block("figures", [_histogram(kind, one) for kind, one in found["kinds"].items() if one["scored"]])


def _histogram(kind: str, one: Mapping[str, Any]) -> Plot:
    def paint(axes: Any) -> None:
        edges = np.array(one["edges"])
        axes.bar(
            edges[:-1], one["counts"], width=np.diff(edges), align="edge", color=ACCENT, alpha=0.55, edgecolor=PAPER
        )
        axes.set(xlabel="reward", ylabel="answers")
        axes.grid(visible=False, axis="x")

    title = PLAYED[kind][0].upper() + PLAYED[kind][1:]
    return draw(f"rewards-{kind}", title, f"{plural(one['scored'], 'answer')} by reward.", paint, height=180)


def _errors(found: Mapping[str, Any]) -> Table:
    rows = [
        [Cell(KINDS[one["kind"]]), Cell(first["source"]), Cell(PLAYED[first["of"]]), Cell(first["error"])]
        for one in found["errors"]
        for first in one["first"]
    ]
    return Table([Column("kind"), Column("row", "source"), Column("answer"), Column("error")], rows)


def _answers(some: Sequence[Mapping[str, Any]]) -> Table:
    columns = [
        Column("row", "source"),
        Column("reward", "number"),
        Column("prompt"),
        Column("answer"),
        Column("reference"),
    ]
    rows = [
        [
            Cell(one["source"]),
            Cell(f"{one['reward']:.3g}"),
            *(Cell(one[key] or "") for key in ("prompt", "answer", "reference")),
        ]
        for one in some
    ]
    return Table(columns, rows)
