"""The report of a run: report.json, report.html and report.md, made from its folder alone."""

from __future__ import annotations

from tunesmith.evaluation.report.values import build
from tunesmith.evaluation.series import RunSeries
from tunesmith.runs.atomic import write_atomic
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject, Record


def write_report(run: Run, facts: Record, progress: Record) -> JsonObject:
    """Write the report of a finished run into its folder and return its values as in report.json.

    `facts` come from `training.summary.report_facts`, `progress` is `training.Progress` in plain values.
    """
    series = RunSeries.of(run.events())
    report = build(run, series, facts, progress)
    run.write_json("report.json", report)
    _write_pages(run, series, report)
    return report


def smoke_test(lengths: Record) -> None:
    """Import everything that a report needs and draw one of its plots: most of the time that it takes.
    `lengths` is the histogram of the report."""
    from tunesmith.evaluation.report.pages import as_html  # noqa: F401
    from tunesmith.evaluation.report.plots import length_plot

    length_plot(lengths)


def _write_pages(run: Run, series: RunSeries, report: Record) -> None:
    from tunesmith.evaluation.report.pages import as_html, as_markdown
    from tunesmith.evaluation.report.sections import make_page

    page = make_page(run, series, report)
    write_atomic(run.path / "report.html", as_html(page).encode())
    write_atomic(run.path / "report.md", as_markdown(page).encode())
