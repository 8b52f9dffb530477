"""The page of a comparison of several runs: one table, and the differences from the first run as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import tunesmith
from tunesmith.evaluation.compare import Comparison, Difference
from tunesmith.evaluation.metrics import info_of
from tunesmith.evaluation.report.plots import ACCENT, INK, MUTED, Plot, draw
from tunesmith.evaluation.report.sections import Cell, Column, Figures, Page, PageSection, Table
from tunesmith.evaluation.report.text import one_line
from tunesmith.formatting import plural


def comparison_page(names: Sequence[str], found: Sequence[Comparison], task: str) -> Page:
    """The page of `evaluation.compare.compare_runs`; `names`: of all runs, the first one first."""
    keys, unit = list(found[0].metrics), "document" if found[0].are_documents else "row"
    plots = [_plot(key, names, [one.metrics[key] for one in found if key in one.metrics]) for key in keys]
    summary = f"{plural(len(names), 'run')} on the {plural(found[0].num_rows, unit)} that all have; A is {names[0]}."
    versions = {"tunesmith": tunesmith.__version__}
    report = {"name": "Comparison", "task": task, "method": plural(len(names), "run"), "versions": versions}
    sections = [
        PageSection("values", "Values", [_table(names, found, keys)]),
        PageSection("differences", "Differences from A", [Figures(plots)]),
    ]
    return Page(report, time.time(), summary, [], ("", ""), sections)


def _table(names: Sequence[str], found: Sequence[Comparison], keys: Sequence[str]) -> Table:
    columns = [Column("run", "name"), *(Column(info_of(key).label, "number") for key in keys)]
    first = [Cell(f"A: {names[0]}"), *(Cell(info_of(key).text(found[0].metrics[key].a)) for key in keys)]
    rows = [first]
    for name, one in zip(names[1:], found, strict=True):
        differs = [one.metrics.get(key) for key in keys]
        rows.append([Cell(name), *(_cell(key, each) for key, each in zip(keys, differs, strict=True))])
    return Table(columns, rows)


def _cell(key: str, differs: Difference | None) -> Cell:
    if differs is None:
        return Cell("–")
    chance = "" if differs.is_clear else ", may be chance"
    return Cell(info_of(key).text(differs.b), f"{info_of(key).difference(differs.b_minus_a)}{chance}")


def _plot(key: str, names: Sequence[str], differences: Sequence[Difference]) -> Plot:
    info, others = info_of(key), [one_line(name, 30) for name in names[1:]]

    def paint(axes: Any) -> None:
        axes.axvline(0, color=INK, linewidth=1, linestyle=(0, (1, 2)))
        for y, differs in enumerate(differences):
            interval, colour = differs.b_minus_a, ACCENT if differs.is_clear else MUTED
            marker = "o" if differs.is_clear else "$\\sim$"
            axes.plot([interval["low"], interval["high"]], [y, y], color=colour, linewidth=1.6)
            axes.plot(interval["value"], y, color=colour, marker=marker, linestyle="")
        axes.set_yticks(range(len(differences)), others[: len(differences)])
        axes.set_ylim(len(differences) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")

    better = "" if info.better == "neither" else f"; {info.better} is better"
    text = f"Difference from A with its 95 % interval{better}. A dot: clear; a wave: may be chance."
    return draw(f"difference-{key}", info.label.capitalize(), text, paint, height=70 + 24 * len(differences))
