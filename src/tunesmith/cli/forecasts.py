"""Needs of a run in words: memory, time and disk of a "plan" event's forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.formatting import duration, plural, size, span

Facts = list[tuple[str, str]]
SETTLED = 8
"""Steps of usual size that count in a probe, the last ones."""

_PHASES = {
    "step": "in the heaviest pass of step {step}",
    "update": "in an update",
    "evaluation": "while held-out rows are measured",
    "rest": "at rest",
}


_OTHER_WORK = {
    "{} to start": ("starting",),
    "{} to measure rows": ("held_out", "surprising", "general"),
    "up to {} to answer prompts": ("answering",),
    "{} for checkpoints": ("saving",),
    "{} to finish": ("finishing",),
}
_ONCE = {
    "starting": "until the first event",
    "held_out": "per token of held-out rows",
    "surprising": "per token of training rows searched for surprising ones",
    "general": "per token of the general text",
    "answering": "per next token of up to 8 answers",
    "saving": "per checkpoint",
    "finishing": "the result and the report",
}


def forecast_facts(forecast: Mapping[str, Any], probe: Mapping[str, Any] | None = None) -> Facts:
    """(name, text) of what is estimated, the most important first; where a probe was made, what it measured too."""
    facts = [("memory", _memory(forecast))]
    seconds = (probe and probe["seconds"]) or forecast["seconds"]
    if seconds:
        facts.append(("time", _time(seconds)))
    if group := forecast.get("group"):
        facts.append(("devices", _group(group)))
    disk = forecast["disk"]
    parts = ", ".join(f"{name} {size(num)}" for name, num in disk.items() if name != "total" and num)
    facts.append(("disk", f"{size(disk['total'])}: {parts}"))
    return facts


def probe_facts(probe: Mapping[str, Any], forecast: Mapping[str, Any] | None, tokens_per_step: float) -> Facts:
    """(name, text) of what a probe measured, and what was estimated."""
    seconds = (forecast or {}).get("seconds")
    facts = []
    if probe["memory"]:
        total = forecast["memory"]["total"] if forecast else 0
        facts.append(("memory", _measured(size(probe["memory"]), "", size(total), probe["memory"], total)))
    usual = probe["steps"][1:][-SETTLED:]
    for some, what in ((probe["steps"][:1], "the heaviest: step {}"), (usual, "usual ones: step {}")):
        if some:
            tokens, taken = sum(one["count"] for one in some), sum(one["seconds"] for one in some)
            expected = _price(seconds, "training") * tokens / tokens_per_step / len(some)
            where = f"{what.format(', '.join(str(one['step']) for one in some))}; {tokens / len(some):,.0f} tokens"
            mean = taken / len(some)
            facts.append(("step", _measured(f"{mean:.3g} s", where, f"{expected:.3g} s", mean, expected)))
    for kind, what in _ONCE.items():
        if one := probe["work"].get(kind):
            found, expected = one["seconds"] / one["count"], _price(seconds, kind)
            where = f"{what}, {size(one['num_bytes'])}" if one["num_bytes"] else what
            text = _measured(f"{found:.2g} s", where, f"{expected:.2g} s", found, expected)
            facts.append((kind.replace("_", " "), text))
    facts += [("note", text) for text in probe["notes"]]
    if probe["ended"]:
        facts.append(("ended", f"early: {probe['ended']}"))
    return facts


def _measured(measured: str, where: str, predicted: str, found: float, expected: float) -> str:
    of = f" ({where})" if where else ""
    return f"{measured}{of}" + (f", estimated {predicted} ({expected / found - 1:+.0%})" if expected and found else "")


def _memory(forecast: Mapping[str, Any]) -> str:
    memory, one = forecast["memory"], forecast["pass"]
    where = _PHASES[memory["phase"]].format(step=one["step"])
    of = plural(one["rows"], "row")
    heavy = f" ({of}, {one['tokens']:,} tokens, {one['targets']:,} targets)" if memory["phase"] == "step" else ""
    parts = ", ".join(f"{name} {size(num)}" for name, num in memory["parts"].items() if num)
    each = " on each device" if forecast.get("group") else ""
    return f"{size(memory['total'])}{each} at most, of {size(forecast['room'])}, {where}{heavy}: {parts}"


def _group(group: Mapping[str, Any]) -> str:
    summed = f"sums of gradients take {group['sum_seconds']:.2g} s a step"
    busy = f"a device has {group['balance']:.0%} of the busiest one's work on average"
    return f"{group['devices']}, each with the whole model and a part of each step: {busy}, {summed}"


def _price(seconds: Mapping[str, Any] | None, kind: str) -> float:
    """0: not known."""
    return float(seconds["work"][kind]["price"]) if seconds else 0.0


def _time(seconds: Mapping[str, Any]) -> str:
    if "work" not in seconds:  # an event of a run that is older than this list of kinds of work
        return "estimated by an earlier version of tunesmith, in parts that this one cannot show"
    work, low, high = seconds["work"], 1 - seconds["spread"], 1 + seconds["spread"]
    parts = {name: sum(work[kind]["seconds"] for kind in kinds) for name, kinds in _OTHER_WORK.items()}
    others = "".join(f"; {name.format(duration(part))}" for name, part in parts.items() if part)
    return (
        f"{span(low * seconds['total'], high * seconds['total'])}: "
        f"{duration(work['training']['seconds'])} to train ({work['training']['price']:.2g} s a step){others}"
    )
