"""`python -m benchmarks serve`: tokens a second of many streams at once, in the engine and over HTTP, beside
`transformers.generate` and llama.cpp.

Contestants run one after the other in processes of their own, round by round, each round beginning with another one.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, machine, run_child, versions

OURS, SERVED, GENERATE = "Tunesmith", "Tunesmith over HTTP", "transformers.generate"
STREAMS = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class Settings:
    """What every contestant is given."""

    model: str
    ggufs: Sequence[str]
    """The same weights for llama.cpp, one file a precision; none: without it."""
    rounds: int
    new_tokens: int
    threads: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One process of one contestant: its rates by the number of streams, and its greedy answers."""

    name: str
    rates: Mapping[int, float]
    answers: Sequence[Sequence[int]]
    facts: Mapping[str, Any]
    error: str = ""


def contestants(settings: Settings) -> dict[str, tuple[str, str]]:
    """By name: what it is run as, and on which file."""
    model = settings.model
    found = {OURS: ("tunesmith", model), SERVED: ("served", model), GENERATE: ("generate", model)}
    return found | {f"llama.cpp, {Path(path).stem}": ("llama_cpp", path) for path in settings.ggufs}


def race(settings: Settings) -> list[Turn]:
    """Every turn of every round, in the order they were run."""
    names = list(contestants(settings))
    turns = []
    for number in range(settings.rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turns.append(one_turn(name, settings))
            rates = ", ".join(f"{rate:.1f} at {streams}" for streams, rate in turns[-1].rates.items())
            print(f"[{number + 1}/{settings.rounds}] {name}: {rates or turns[-1].error}", file=sys.stderr, flush=True)
    return turns


def one_turn(name: str, settings: Settings) -> Turn:
    """A contestant in a new process."""
    kind, model = contestants(settings)[name]
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder, "job.json"), Path(folder, "out.json")
        fields = {"kind": kind, "model": model, "tokenizer": settings.model, "streams": STREAMS}
        fields |= {"new_tokens": settings.new_tokens, "threads": settings.threads}
        job.write_text(json.dumps(fields), "utf-8")
        script = ROOT / "benchmarks" / "peers" / "serve_peer.py"
        child = run_child([sys.executable, str(script), str(job), str(out)], log=Path(folder, "log"))
        if child.code or not out.exists():
            return Turn(name, {}, [], {}, error=f"exit code {child.code}\n{child.tail}")
        told = json.loads(out.read_text("utf-8"))
    return Turn(name, {int(streams): rate for streams, rate in told["rates"].items()}, told["answers"], told["facts"])


def agreement(ours: Turn, theirs: Turn) -> tuple[int, int]:
    """How many greedy answers are token for token the same, and how many tokens before the first difference of all."""
    same = sum(list(a) == list(b) for a, b in zip(ours.answers, theirs.answers, strict=True))
    common = 0
    for a, b in zip(ours.answers, theirs.answers, strict=True):
        common += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same, common


def page(settings: Settings, turns: Sequence[Turn], command: str) -> str:
    """The table in Markdown."""
    by_name = {name: [t for t in turns if t.name == name and not t.error] for name in contestants(settings)}
    heads = " | ".join(f"{streams} stream{'s' * (streams > 1)}" for streams in STREAMS)
    lines = [f"`{command}`", "", f"| tokens/s, median (range) | {heads} |", "|---|" + "---|" * len(STREAMS)]
    for name, some in by_name.items():
        cells = [_spread([turn.rates[streams] for turn in some]) for streams in STREAMS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if by_name[OURS]:
        lines += ["", *_ratios(by_name), *_agreements(settings, by_name)]
    info = machine()
    where = f"{info['processor']}, {info['cores']} cores, {settings.threads} threads"
    lines += ["", f"{where}; {settings.rounds} rounds of {settings.new_tokens} new tokens a stream."]
    found = {**versions(), **(by_name[OURS][0].facts if by_name[OURS] else {})}
    found |= {key: value for some in by_name.values() for turn in some for key, value in turn.facts.items()}
    lines.append(", ".join(f"{key} {value}" for key, value in found.items() if value != "absent") + ".")
    lines += [f"\n{turn.name} failed: {turn.error}" for turn in turns if turn.error]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})" if values else "failed"


def _ratios(by_name: Mapping[str, Sequence[Turn]]) -> list[str]:
    """Ours over each, round by round, then the median."""
    lines = []
    for name, some in by_name.items():
        if name == OURS or not some:
            continue
        parts = []
        for streams in STREAMS:
            pairs = zip(by_name[OURS], some, strict=False)
            ratio = statistics.median(ours.rates[streams] / theirs.rates[streams] for ours, theirs in pairs)
            parts.append(f"{ratio:.2f} at {streams}")
        lines.append(f"Tunesmith is × {', '.join(parts)} as fast as {name}.")
    return lines


def _agreements(settings: Settings, by_name: Mapping[str, Sequence[Turn]]) -> list[str]:
    if not by_name[GENERATE]:
        return []
    ours = by_name[OURS][0]
    same, common = agreement(ours, by_name[GENERATE][0])
    total = sum(map(len, ours.answers))
    return [
        f"Greedy answers of {len(ours.answers)} streams together, beside generate's alone: {same} of "
        f"{len(ours.answers)} are the same to the last token, {common} of {total} tokens stand before a difference."
    ]
