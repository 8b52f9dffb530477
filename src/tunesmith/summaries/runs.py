"""A run in plain values: what `tunesmith runs --json` and `show --json` print, and what pages show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import TunesmithError
from tunesmith.evaluation.series import RunSeries
from tunesmith.phrases import about, percent
from tunesmith.runs.folder import Run, model_shown
from tunesmith.summaries.words import PHASES
from tunesmith.types import Event, JsonObject

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


UNREADABLE = (TunesmithError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError)
"""Errors of a run folder that a fault damaged, or that somebody else wrote."""


def unreadable(run: Run, error: Exception) -> JsonObject:
    """A run that cannot be read, and why."""
    why = str(error)
    if not isinstance(error, TunesmithError):
        why = f"{run.path}: something in it is not as a run writes it ({type(error).__name__}: {error})."
    return {"name": run.path.name, "path": str(run.path), "created": 0.0, "state": "unreadable", "problem": why}


def facts(run: Run, series: RunSeries | None = None, recipe: Recipe | None = None) -> JsonObject:
    """One run in plain values; one that cannot be read says why instead of hiding the others.

    `series`, `recipe`: its events and its recipe, where they were read already.
    `fields`: what it can be filtered and sorted by.
    """
    from tunesmith.recipe.docs import flat

    try:
        recipe, series = recipe or run.recipe(), series or RunSeries.of(run.events())
        plain = {
            "name": run.path.name,
            "state": run.state(),
            "created": run.created,
            "model": model_shown(recipe.model),
        }
    except UNREADABLE as error:
        known = unreadable(run, error)
        return known | {"fields": {key: text for key, text in known.items() if key != "problem"}}
    plain |= {"task": recipe.task, "method": recipe.method.name, "step": series.step, "steps": series.total_steps}
    general = {
        name: {"general_loss": {"value": general_result["loss"]}} for name, general_result in series.general.items()
    }
    before, after = (series.score(name) or {"measures": general.get(name, {})} for name in ("before", "after"))
    losses = {"before": before.get("loss"), "after": after.get("loss", series.curve[-1] if series.curve[1:] else None)}
    losses = losses if series.aim == "loss" else dict.fromkeys(losses)  # the measures have the reward
    fields = flat(recipe.model_dump()) | {
        f"before.{key}": measure["value"] for key, measure in before["measures"].items()
    }
    fields |= {"loss": losses["after"]} | {key: measure["value"] for key, measure in after["measures"].items()}
    measures = {"before": before["measures"], "after": after["measures"]}
    place = {"name": run.path.name, "path": str(run.path)}
    return {**place, **plain, **losses, "measures": measures, "fields": fields | plain}


def settings_that_differ(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The options that are not the same in all of the runs, by key: the value in each, None where it has none.
    Empty where the recipe of one cannot be read."""
    from tunesmith.recipe.docs import flat

    try:
        options = [flat(run.recipe().model_dump(mode="json")) for run in runs]
    except UNREADABLE:
        return {}
    by_key = {key: [values.get(key) for values in options] for key in dict.fromkeys(chain.from_iterable(options))}
    return {key: values for key, values in by_key.items() if any(value != values[0] for value in values)}


def model_name(model: Path) -> str:
    """The last part of a model's name or path; of another run's result or snapshot that run's name."""
    is_result = model.name in ("merged", "model") and (model.parent / "run.json").is_file()
    run = model.parents[2] if is_result and model.parent.parent.name == "snapshots" else model.parent
    return run.name if is_result else model.name


def phase(run: Run, newest: float) -> str:
    """The phase that a run at work has been in since `newest`, the time of its last event: "measuring held-out
    rows: 42 %"; empty if it said nothing since."""
    try:
        note = run.read_json("progress.json")
        if float(note["time"]) < newest:
            return ""
        words, done, total = PHASES.get(str(note["what"]), str(note["what"])), int(note["done"]), int(note["total"])
    except (TunesmithError, KeyError, TypeError, ValueError):
        return ""
    return f"{words}: {percent(done / total, 0)}" if 0 <= done <= total and total > 1 else words


def time_left(series: RunSeries) -> str:
    """The time that a run under way still takes, as far as it is known: "about 27 s of training,
    then about 75 s of measuring". The second half of what was foreseen for measuring,
    answering and grading comes after the last step."""
    training, seconds = series.seconds_left, (series.plan.get("forecast") or {}).get("seconds") or {}
    if training is None:
        return ""
    work = {kind: entry["seconds"] for kind, entry in seconds.get("work", {}).items()}
    rest = sum(work.get(kind, 0) for kind in ("measuring", "answering", "grading")) / 2 + work.get("finishing", 0)
    parts = [f"{about(training)} of training"] if series.step < series.total_steps else []
    parts += [f"{about(rest)} of measuring"] if rest >= 1 else []
    return ", then ".join(parts)


def ending(series: RunSeries, last: Event | None, state: str) -> tuple[str, str]:
    """Why a run does not go on: (code, words); both empty for one that is under way or done."""
    if last is not None and last.kind in ("failed", "stopped") and state in ("failed", "stopped"):
        code = str(last.values.get("code", "")) if last.kind == "failed" else ""
        return code, str(last.values.get("message", ""))
    if state == "interrupted":
        where = f"step {series.step:,}" if series.step else "its start"
        return "", f"its process ended without a word after {where}: it was killed, or the machine went down"
    return "", ""
