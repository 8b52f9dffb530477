"""What a run will need, in words: memory, time and disk of a "plan" event's forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.cli.text import plural, size
from tunesmith.probing.found import usual
from tunesmith.values import duration

Facts = list[tuple[str, str]]

_PHASES = {
    "step": "in the heaviest pass of step {step}",
    "update": "in an update",
    "evaluation": "while held-out rows are measured",
    "rest": "at rest",
}


_BESIDE_TRAINING = {
    "looking": "measuring rows",
    "answering": "answers at most",
    "saving": "checkpoints",
    "starting": "loading",
}


def forecast_facts(forecast: Mapping[str, Any], probe: Mapping[str, Any] | None = None) -> Facts:
    """(name, text) of what is predicted, the most important first; where a probe was made, what it measured too."""
    facts = [("memory", _memory(forecast))]
    seconds = (probe and probe["seconds"]) or forecast["seconds"]
    if seconds:
        facts.append(("time", _time(seconds)))
    disk = forecast["disk"]
    parts = ", ".join(f"{name} {size(num)}" for name, num in disk.items() if name != "total" and num)
    facts.append(("disk", f"{size(disk['total'])}: {parts}"))
    return facts


def probe_facts(probe: Mapping[str, Any], forecast: Mapping[str, Any] | None, tokens_per_step: float) -> Facts:
    """(name, text) of what a probe measured, beside what was predicted."""
    seconds = (forecast or {}).get("seconds")
    facts = []
    if probe["memory"]:
        total = forecast["memory"]["total"] if forecast else 0
        later = probe["memory"] - probe["peak"]
        more = f"{size(probe['peak'])} now, and {size(later)} in the course of the run" if later else ""
        facts.append(("memory", _beside(size(probe["memory"]), more, size(total), probe["memory"], total)))
    for some, what in ((probe["steps"][:1], "the heaviest: step {}"), (usual(probe["steps"]), "usual ones: step {}")):
        if some:
            tokens, taken = sum(one["tokens"] for one in some), sum(one["seconds"] for one in some)
            expected = seconds["step"] * tokens / tokens_per_step / len(some) if seconds else 0.0
            where = f"{what.format(', '.join(str(one['step']) for one in some))}; {tokens / len(some):,.0f} tokens"
            mean = taken / len(some)
            facts.append(("step", _beside(f"{mean:.3g} s", where, f"{expected:.3g} s", mean, expected)))
    if one := probe["evaluation"]:
        expected = seconds["look"] if seconds else 0.0
        where = f"a batch of held-out rows, {one['tokens']:,} tokens"
        facts.append(
            ("looking", _beside(f"{one['seconds']:.3g} s", where, f"{expected:.3g} s", one["seconds"], expected))
        )
    if one := probe["word"]:
        facts.append(("answers", f"{one['seconds']:.3g} s the next token of up to 8 answers"))
    if one := probe["save"]:
        facts.append(("checkpoint", f"{size(one['num_bytes'])} in {one['seconds']:.3g} s"))
    if one := probe["starting"]:
        facts.append(("loading", duration(one["seconds"])))
    facts += [("note", text) for text in probe["notes"]]
    if probe["ended"]:
        facts.append(("ended", f"early: {probe['ended']}"))
    return facts


def _beside(measured: str, where: str, predicted: str, found: float, expected: float) -> str:
    of = f" ({where})" if where else ""
    return f"{measured}{of}" + (f", predicted {predicted} ({expected / found - 1:+.0%})" if expected and found else "")


def _memory(forecast: Mapping[str, Any]) -> str:
    memory, one = forecast["memory"], forecast["pass"]
    where = _PHASES[memory["phase"]].format(step=one["step"])
    of = plural(one["rows"], "row")
    heavy = f" ({of}, {one['tokens']:,} tokens, {one['targets']:,} targets)" if memory["phase"] == "step" else ""
    parts = ", ".join(f"{name} {size(num)}" for name, num in memory["parts"].items() if num)
    return f"{size(memory['total'])} at most, of {size(forecast['room'])}, {where}{heavy}: {parts}"


def _time(seconds: Mapping[str, float]) -> str:
    total = sum(seconds[name] for name in ("training", *_BESIDE_TRAINING))
    low, high = total * (1 - seconds["spread"]), total * (1 + seconds["spread"])
    others = "".join(
        f"; {duration(seconds[name])} of {what}" for name, what in _BESIDE_TRAINING.items() if seconds[name]
    )
    return (
        f"{duration(low)} to {duration(high)}: {duration(seconds['training'])} of training, "
        f"{seconds['step']:.2g} s a step{others}"
    )
