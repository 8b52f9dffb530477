"""The page of a sweep: a table of its trials, and a picture of their courses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

import tunesmith
from tunesmith.evaluation.metrics import info_of
from tunesmith.evaluation.report.plots import ACCENT, INK, MUTED, Plot, draw
from tunesmith.evaluation.report.sections import Block, Cell, Column, Page, PageSection, Table
from tunesmith.phrases import option, plural
from tunesmith.sweeps.grid import Grid
from tunesmith.sweeps.sweep import Outcome

CHOSEN = (
    "The best of several trials looks a little better on the rows it was chosen by than it is. Measure it on rows that "
    "no trial was measured on: tunesmith eval RUN FILE."
)


def sweep_page(grid: Grid, outcomes: Sequence[Outcome]) -> Page:
    """The page; `outcomes`: of all trials, the best first."""
    counts = {state: sum(outcome.state == state for outcome in outcomes) for state in ("done", "stopped", "failed")}
    shown = ", ".join(f"{num} {state}" for state, num in counts.items() if num)
    best = outcomes[0]
    found = f" The best is {best.trial.name}." if best.state == "done" else ""
    report = {
        "name": grid.name,
        "task": "sweep",
        "method": plural(len(outcomes), "trial"),
        "versions": {"tunesmith": tunesmith.__version__},
    }
    sections = [PageSection("trials", "Trials", [_table(grid, outcomes), Block("paragraph", CHOSEN)])]
    if courses := _courses(grid, outcomes):
        sections.append(PageSection("courses", "Courses", [Block("figures", courses)]))
    return Page(report, time.time(), f"{plural(len(outcomes), 'trial')}: {shown}.{found}", [], ("", ""), sections)


def _table(grid: Grid, outcomes: Sequence[Outcome]) -> Table:
    info = info_of(grid.metric)
    columns = [Column("trial", "name"), *(Column(key, "number") for key in grid.keys)]
    columns += [Column(info.label, "number"), Column("steps", "number"), Column("state")]
    rows = []
    for outcome in outcomes:
        measure = outcome.measure
        measured = Cell("–") if measure is None else Cell(info.text(measure["value"]), info.bounds(measure))
        options = [Cell(option(outcome.trial.options[key])) for key in grid.keys]
        steps = f"{outcome.step:,} of {outcome.total:,}" if outcome.total else "–"
        state = f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
        rows.append([Cell(outcome.trial.name), *options, measured, Cell(steps), Cell(state)])
    return Table(columns, rows)


def _courses(grid: Grid, outcomes: Sequence[Outcome]) -> list[Plot]:
    """The metric over the steps of every trial."""
    courses = [(outcome, sorted(outcome.course.items())) for outcome in outcomes]
    courses = [(outcome, points) for outcome, points in courses if len(points) > 1]
    if not courses:
        return []
    info = info_of(grid.metric)

    def paint(axes: Any) -> None:
        for outcome, points in reversed(courses):
            is_best = outcome is outcomes[0] and outcome.state == "done"
            colour, width = (ACCENT, 2.0) if is_best else (INK if outcome.state == "done" else MUTED, 1.0)
            line = "-" if outcome.state == "done" else (0, (3, 2))
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, linestyle=line)
            axes.plot(*points[-1], color=colour, marker="o" if outcome.state == "done" else "x", linestyle="")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))

    text = (
        "On held-out rows. Thick: the best trial; thin: others that are done; dashed with a cross: stopped or failed."
    )
    return [draw("courses", info.label.capitalize(), text, paint, width=640, height=320)]
