"""The page of `python -m benchmarks train`: a table for each set of settings, ratios round by round, versions."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import machine
from benchmarks.table import place
from benchmarks.train import OURS, Turn

BEGIN, END = "<!-- measured by benchmarks train: begin -->", "<!-- measured by benchmarks train: end -->"
"""Between these lines of docs/inside/performance.md the page goes."""
COLUMNS: Mapping[str, tuple[Callable[[Turn], float | None], str]] = {
    "tokens/s": (lambda turn: turn.tokens_per_second, ".0f"),
    "targets/s": (lambda turn: turn.targets_per_second, ".0f"),
    "first step, s": (lambda turn: turn.first_step_seconds, ".1f"),
    "peak RSS, GiB": (lambda turn: turn.child["peak_bytes"] / 2**30, ".2f"),
    "share of the products' limit": (lambda turn: turn.share, ".2f"),
    "held-out loss": (lambda turn: turn.held_out, ".3f"),
}
"""What a table shows of each contestant: of a turn, and how it is written."""
RATIOS = ("tokens/s", "first step, s", "peak RSS, GiB")
MEANING = (
    "Tokens and targets a second: from step to step, padding left out, after half of the steps (ten at most) as "
    "warm-up. First step: from the start of the process to the end of its first step; Tunesmith checks, measures and "
    "saves before it. Peak RSS: of the fresh process. Share of the products' limit: the time of the model's own matrix "
    "products alone, measured right after the run at its shapes, over that of its steps. "
    "Held-out loss: per target of what each saved, by transformers in "
    "float32, the same code for all. All have libgomp's own `GOMP_SPINCOUNT=300000`. Median (lowest to highest) of "
    "the rounds; a round's seed is its number."
)


def read_turns(work: Path) -> list[Turn]:
    """Every result in a work folder."""
    return [Turn(**json.loads(path.read_text("utf-8"))) for path in sorted((work / "turns").glob("*.json"))]


def page(command: str, turns: Sequence[Turn], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown. `facts` says of each name of rows how many tokens they have."""
    info = machine()
    lines = [f"`{command}`", "", f"{info['processor']}, {info['cores']} cores, {info['memory_bytes'] / 2**30:.0f} GiB."]
    lines += [_versions(turns), "", MEANING]
    for settings, group in _grouped(turns):
        lines += ["", *_table(settings, group, facts[settings["rows"]])]
    lines += ["", *_arguments(turns)]
    for turn in turns:
        if turn.error:
            what = f"{turn.name}, {turn.settings['rows']}, {turn.settings['method']}, round {turn.round}"
            lines += ["", f"{what}, failed:", "", "````", turn.error, "````"]
    return "\n".join(lines) + "\n"


def _grouped(turns: Sequence[Turn]) -> list[tuple[dict[str, Any], list[Turn]]]:
    groups: dict[str, list[Turn]] = {}
    for turn in turns:
        groups.setdefault(json.dumps(dict(turn.settings), sort_keys=True), []).append(turn)
    return [(json.loads(key), group) for key, group in groups.items()]


def _table(settings: Mapping[str, Any], turns: Sequence[Turn], facts: Mapping[str, Any]) -> list[str]:
    given = {key: place(value) if key == "model" else value for key, value in settings.items() if key != "rows"}
    if settings["method"] == "full":
        given = {key: value for key, value in given.items() if key not in ("rank", "alpha")}
    lines = [
        f"**{settings['method']}, rows {settings['rows']}**: {facts['rows']} rows of {facts['tokens']:.0f} tokens and "
        f"{facts['targets']:.1f} targets in the mean; {', '.join(f'{key} {value}' for key, value in given.items())}.",
        "",
        f"| | {' | '.join(COLUMNS)} | rounds |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    names = sorted({turn.name for turn in turns}, key=lambda name: (name != OURS, name))
    for name in names:
        own = [turn for turn in turns if turn.name == name]
        whole = [turn for turn in own if not turn.error]
        cells = [
            _spread([found for turn in whole if (found := value(turn)) is not None], form)
            for value, form in COLUMNS.values()
        ]
        count = str(len(whole)) if len(whole) == len(own) else f"{len(whole)} of {len(own)}: the others failed"
        lines.append(f"| {name} | {' | '.join(cells)} | {count} |")
    return [*lines, "", *(line for name in names if name != OURS for line in _ratios(turns, name))]


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "–"
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _ratios(turns: Sequence[Turn], name: str) -> list[str]:
    """Ours over the peer's within each round, then the median: both met the machine in about the same state."""
    ours, theirs = ({t.round: t for t in turns if t.name == of and not t.error} for of in (OURS, name))
    parts = []
    for column in RATIOS:
        value, _ = COLUMNS[column]
        pairs = [(value(ours[i]), value(theirs[i])) for i in sorted(ours.keys() & theirs.keys())]
        ratios = [mine / other for mine, other in pairs if mine is not None and other]
        if ratios:
            parts.append(f"{column.split(',')[0]} {_spread(ratios, '.2f')} times")
    return [f"Tunesmith over {name}, round by round: {'; '.join(parts)}.  "] if parts else []


def _versions(turns: Sequence[Turn]) -> str:
    """Of ours and of each peer's environment."""
    told: dict[str, set[str]] = {}
    for turn in turns:
        who = OURS if turn.name == OURS else turn.name.split(",")[0]
        told.setdefault(who, set()).update(
            f"{key} {value}" for key, value in turn.versions.items() if value != "absent"
        )
    return " ".join(f"{who}: {', '.join(sorted(found))}." for who, found in told.items())


def _arguments(turns: Sequence[Turn]) -> list[str]:
    found = {turn.name: turn.arguments for turn in turns if turn.name != OURS}
    return [
        f"{name}: {', '.join(f'`{key}={value}`' for key, value in given.items()) or 'nothing else is set'}.  "
        for name, given in found.items()
    ]
