"""The report of a run: report.json, report.md and report.html, made from its folder alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from tunesmith.evaluation.report import wording
from tunesmith.evaluation.report.log import Log
from tunesmith.evaluation.report.markdown import as_markdown
from tunesmith.runs.atomic import write_atomic
from tunesmith.runs.folder import Run


def write_report(run: Run, facts: Mapping[str, Any], progress: Mapping[str, Any]) -> dict[str, Any]:
    """The report of a finished run, written into its folder in three forms; its values as report.json has them.

    `facts` are what `describing.report_facts` says, `progress` is `training.Progress` in plain values.
    """
    from tunesmith.evaluation.report.build import build

    log = Log.of(run.events())
    report = build(run, log, facts, progress)
    run.write_json("report.json", report)
    _write_pages(run, log, report)
    return report


def rehearse(lengths: Mapping[str, Any]) -> None:
    """Everything imported that a report needs, and one of its plots drawn: most of the time that it takes. `lengths`:
    what `describing.length_histogram` says."""
    from tunesmith.evaluation.report.build import build  # noqa: F401
    from tunesmith.evaluation.report.html import as_html  # noqa: F401
    from tunesmith.evaluation.report.plots import length_plot

    length_plot(lengths)


def redraw(run: Run) -> None:
    """report.md and report.html once more, from report.json, the events and each row's outcome.

    Raises RunError where the run has no report.
    """
    from tunesmith.evaluation.report.judging import up_to_date

    _write_pages(run, Log.of(run.events()), up_to_date(run, run.read_json("report.json")))


def _write_pages(run: Run, log: Log, report: Mapping[str, Any]) -> None:
    from tunesmith.evaluation.report.html import as_html
    from tunesmith.evaluation.report.plots import answer_plots, length_plot, training_plots

    page = _page(run, log, report)
    write_atomic(run.path / "report.md", as_markdown(page).encode())
    details = report["details"]["after"]
    lengths = [length_plot(report["lengths"])] if report.get("lengths") else []
    html = as_html(page, training_plots(log, report), answer_plots(details), lengths)
    write_atomic(run.path / "report.html", html.encode())


def _page(run: Run, log: Log, report: Mapping[str, Any]) -> dict[str, Any]:
    """What every form of the report is made of."""
    general = report["general"]
    forgotten = [general["verdict"]] if general and general["past_bound"] else []
    notes = list(dict.fromkeys([*forgotten, *report["notes"], *log.plan.get("warnings", ()), *log.notes]))
    return {
        "report": report,
        "summary": wording.summary(report),
        "kept": wording.kept(report),
        "effort": wording.effort(report, log.plan),
        "gist": wording.gist_lines(report),
        "lines": wording.measure_lines(report),
        "columns": wording.sides(report),
        "pairs": wording.confused_pairs(report["details"]["after"]),
        "notes": notes,
        "choices": log.plan.get("choices", []),
        "hashes": {key: digest for key, digest in log.identity.items() if not key.startswith("setting ")},
        "recipe": run.recipe_path.read_text("utf-8"),
        "command": f"tunesmith train --recipe {shlex.quote(str(run.recipe_path))}",
        "created": run.created,
    }
