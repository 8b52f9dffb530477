"""What came of a run, judged from each row's outcome before and after: what report, terminal and `show` all say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.evaluation.report import wording
from tunesmith.evaluation.report.held_out import answers_of, rows_of
from tunesmith.evaluation.scores import are_short
from tunesmith.evaluation.verdicts import answer_baseline, changes, row_baseline
from tunesmith.runs.folder import Run
from tunesmith.types import has_new_head


def judged(run: Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its `changes`, `baseline` and `headline`. Raises RunError for a broken file of the evaluation."""
    details = report["details"]["after"]
    classes = details.get("labels", ())
    after = list(rows_of(run, "after").values())
    baseline = row_baseline(after, _constant(report), classes)
    if baseline is None and "answers" in (report["metrics"]["after"] or {}):
        baseline = answer_baseline(answers_of(run, "after"))
    found: dict[str, Any] = {"changes": {}, "baseline": baseline}
    if report["metrics"]["before"] is not None:
        before = list(rows_of(run, "before").values())
        answers = [answers_of(run, name) for name in ("before", "after")]
        found["changes"] = changes(before, after, *answers, classes=classes)
        if report.get("general"):
            moved = report["general"]["change"]
            is_clear = moved["low"] > 0 or moved["high"] < 0
            found["changes"]["general_loss"] = {**moved, "is_clear": is_clear}
    whole = {**report, **found}
    return {**whole, "headline": list(wording.headline(whole))}


def up_to_date(run: Run, report: Mapping[str, Any]) -> dict[str, Any]:
    """A report as this version writes it: one of an earlier version is judged anew from the run's folder."""
    if "headline" in report:
        return dict(report)
    metrics, details = report["metrics"], report["details"]
    if has_new_head(report):
        metrics, details = {**metrics, "before": None}, {**details, "before": {}}
        report = {**report, "flips": None, "worse_rows": []}
    short = are_short([sample.get("reference", "") for sample in report["samples"]])
    return judged(run, {**report, "metrics": metrics, "details": details, "short_answers": short})


def _constant(report: Mapping[str, Any]) -> Any:
    """What a constant would answer; of an earlier version's report by the counts of the training rows' labels."""
    details, counts = report["details"]["after"], report.get("labels") or {}
    if "constant" in details or not counts or not details:
        return details.get("constant")
    is_sets = "per_class" in details and "confusion" not in details
    usual = [name for name, num in counts.items() if 2 * num > report["rows"]["train"]]
    return {"answer": usual if is_sets else max(counts, key=counts.__getitem__), "from": "the training rows"}
