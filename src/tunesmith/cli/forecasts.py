"""What a run will need, in words: memory, time and disk of a "plan" event's forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.cli.text import duration, plural, size

Facts = list[tuple[str, str]]

_PHASES = {
    "step": "in the heaviest pass of step {step}",
    "update": "in an update",
    "evaluation": "while held-out rows are measured",
    "rest": "at rest",
}


def forecast_facts(forecast: Mapping[str, Any]) -> Facts:
    """(name, text) of what is predicted, the most important first."""
    facts = [("memory", _memory(forecast))]
    if forecast["seconds"]:
        facts.append(("time", _time(forecast["seconds"])))
    disk = forecast["disk"]
    parts = ", ".join(f"{name} {size(num)}" for name, num in disk.items() if name != "total" and num)
    facts.append(("disk", f"{size(disk['total'])}: {parts}"))
    return facts


def _memory(forecast: Mapping[str, Any]) -> str:
    memory, one = forecast["memory"], forecast["pass"]
    where = _PHASES[memory["phase"]].format(step=one["step"])
    of = plural(one["rows"], "row")
    heavy = f" ({of}, {one['tokens']:,} tokens, {one['targets']:,} targets)" if memory["phase"] == "step" else ""
    parts = ", ".join(f"{name} {size(num)}" for name, num in memory["parts"].items() if num)
    return f"{size(memory['total'])} at most, of {size(forecast['room'])}, {where}{heavy}: {parts}"


def _time(seconds: Mapping[str, float]) -> str:
    total = seconds["training"] + seconds["looking"]
    low, high = total * (1 - seconds["spread"]), total * (1 + seconds["spread"])
    return (
        f"{duration(low)} to {duration(high)}: {duration(seconds['training'])} of training, "
        f"{seconds['step']:.2g} s a step; {duration(seconds['looking'])} of measuring held-out rows"
    )
