"""A run as it is now, in plain values: what goes on, and its curves in as many
points as a picture has room for."""

# S steps

from __future__ import annotations

from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np

from tunesmith.evaluation.series import RunSeries
from tunesmith.runs.folder import Run
from tunesmith.summaries.runs import ending, phase, time_left
from tunesmith.summaries.words import choice_line, plan_facts, step_line
from tunesmith.types import Event, JsonObject

MOST_POINTS = 2_000
SHOWN_ANSWERS = 3


def under_way(run: Run, series: RunSeries, last: Event | None, state: str) -> JsonObject:
    """Values of a run besides its facts: how far it is, why it does not go on, and what it logged."""
    if state == "unreadable":
        return {}
    code, why = ending(series, last, state)
    ways = last.values.get("ways", []) if last is not None and code else []
    as_typed = [{key: str(value) for key, value in way["settings"].items()} for way in ways]
    plan, is_running = series.plan, state == "running"
    kept_step = series.report.get("kept", {}).get("step")
    return {
        "now": step_line(series, is_at_work=False) if series.step in series.steps else "",
        "phase": phase(run, last.time if last else 0.0) if is_running else "",
        "time_left": time_left(series) if is_running else "",
        "is_stopping": is_running and run.stop_asked(),
        "ended_by": {"code": code, "message": why, "ways": as_typed},
        "curve": [[step, value] for step, value in series.held_out(kept_step).items()],
        "aim": series.aim,
        "plan": plan_facts(plan) if plan.get("rows") else [],
        "choices": [choice_line(choice) for choice in plan.get("choices", ())],
        "notes": list(dict.fromkeys([*plan.get("warnings", ()), *series.notes])),
        "details": list(dict.fromkeys(series.details)),
        "samples": [series.samples[index] for index in islice(sorted(series.samples), SHOWN_ANSWERS)],
        "has_report": run.report_path.is_file(),
        "last_time": last.time if last else None,
        "peak_bytes": series.peak_bytes,
    }


def curve_values(series: RunSeries, points: int = MOST_POINTS, first: int = 0, last: int | None = None) -> JsonObject:
    """The training loss, or reward, from step `first` to `last` in at most `points` buckets of lowest, highest
    and mean, by the last step of each; and those of held-out rows, all of them."""
    steps, end = series.steps, series.step if last is None else last
    numbers_S = np.fromiter(steps, np.int64, len(steps))
    values_S = np.fromiter((step.value for step in steps.values()), np.float64, len(steps))
    inside = (numbers_S >= first) & (numbers_S <= end)
    numbers_S, values_S = numbers_S[inside], values_S[inside]
    width = max(1, -(-len(numbers_S) // max(1, points)))
    starts = np.arange(0, len(numbers_S), width)
    ends = np.minimum(starts + width, len(numbers_S))
    columns: dict[str, list[Any]] = {"step": numbers_S[ends - 1].tolist(), "mean": [], "low": [], "high": []}
    if len(starts):
        with np.errstate(all="ignore"):  # a run that diverged
            means = np.add.reduceat(values_S, starts) / (ends - starts)
            lows, highs = np.minimum.reduceat(values_S, starts), np.maximum.reduceat(values_S, starts)
        for name, values in (("mean", means), ("low", lows), ("high", highs)):
            columns[name] = [_finite(value) for value in values.tolist()]
    kept_step = series.report.get("kept", {}).get("step")
    held_out = [[step, _finite(value)] for step, value in series.held_out(kept_step).items()]
    points_of = {"training": columns, "held_out": held_out}
    return {"steps": series.total_steps, "width": width, **points_of, "kept": kept_step, "aim": series.aim}


def _finite(value: Any) -> float | None:
    """The number, or None for what JSON and a curve have no place for."""
    with suppress(TypeError, ValueError):
        return float(value) if abs(float(value)) < 1e300 else None
    return None
