"""Results as a Markdown page and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import COLUMNS, RULE, WARM_UP_STEPS, Result, verdict

RATIOS = ("examples/s", "training, s", "whole process, s", "peak RSS, GiB")


@dataclass(frozen=True, slots=True)
class Bench:
    """All that a page says."""

    command: str
    settings: Mapping[str, Any]
    rows: Mapping[str, int]
    majority: float
    """Accuracy of always answering the commonest class of the training rows."""
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    arguments: Mapping[str, Mapping[str, Any]]
    """What each contestant was given beside the settings."""
    results: Sequence[Result]


def place(word: str) -> str:
    """A path as its last part, so that a page does not tell where things lie on a machine; other words unchanged."""
    path = Path(word)
    return path.name if path.parent != Path() and path.parent.exists() else word


def verdicts(bench: Bench) -> list[tuple[bool | None, str]]:
    """Of ours, the first contestant, against each other one; empty where it ran alone."""
    ours, *peers = _by_name(bench)
    return [verdict(ours, peer) for peer in peers]


def as_json(bench: Bench) -> dict[str, Any]:
    """Everything, every single result included."""
    told = [{"holds": holds, "text": text} for holds, text in verdicts(bench)]
    return {**asdict(bench), "rule": RULE, "verdicts": told}


def markdown(bench: Bench) -> str:
    """The page: settings, table, ratios, verdicts, and the error of every run that failed."""
    groups = _by_name(bench)
    columns = " | ".join(COLUMNS)
    shown = {name: value for name, value in bench.settings.items() if name not in ("train", "eval")}
    settings = ", ".join(f"{name} {value}" for name, value in {**shown, "model": place(shown["model"])}.items())
    machine = bench.machine
    loads = [result.child.load_before for result in bench.results]
    lines = [
        f"`{bench.command}`",
        "",
        f"{bench.rows['train']:,} training rows, {bench.rows['eval']:,} test rows; {settings}. "
        f"Always the commonest class: accuracy {bench.majority:.3f}.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, "
        f"{machine['system']}, load before the runs {min(loads):.1f} to {max(loads):.1f}. "
        + ", ".join(f"{name} {value}" for name, value in bench.versions.items())
        + ".",
        "",
        f"| median (lowest to highest) | {columns} | runs |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
        *(_row(group) for group in groups),
        "",
        f"examples/s: after {WARM_UP_STEPS} steps of warm-up (half of all steps if they are fewer than "
        f"{2 * WARM_UP_STEPS}), from step to step. Peak RSS: of the fresh process that trains.",
        *(f"{name}: {given}." for name, given in _given(bench)),
        "",
    ]
    for peer in groups[1:]:
        lines += [_ratios(groups[0], peer), ""]
    if told := verdicts(bench):
        lines += [RULE, "", *(f"**{text}**  " for _, text in told), ""]
    for result in bench.results:
        if result.error:
            lines += [f"{result.name}, seed {result.seed}, failed:", "", "````", result.error, "````", ""]
    return "\n".join(lines)


def _by_name(bench: Bench) -> list[list[Result]]:
    """Results of each contestant by seed, ours first."""
    groups = [[result for result in bench.results if result.name == name] for name in bench.arguments]
    return [sorted(group, key=lambda result: result.seed) for group in groups if group]


def _spread(values: Sequence[float], form: str) -> str:
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _given(bench: Bench) -> list[tuple[str, str]]:
    """What each contestant was given beside the settings, and what it chose by itself."""
    facts = {result.name: result.facts for result in bench.results if not result.error}
    told = {name: {**given, **facts.get(name, {})} for name, given in bench.arguments.items()}
    return [(name, ", ".join(f"`{key}={value}`" for key, value in words.items())) for name, words in told.items()]


def _row(group: Sequence[Result]) -> str:
    whole = [result for result in group if not result.error]
    cells = []
    for value, form in COLUMNS.values():
        values = [value(result) for result in whole]
        cells.append(_spread(values, form) if values else "–")
    runs = str(len(whole)) if len(whole) == len(group) else f"{len(whole)} of {len(group)}: the others failed"
    return f"| {group[0].name} | {' | '.join(cells)} | {runs} |"


def _ratios(ours: Sequence[Result], peer: Sequence[Result]) -> str:
    """Ours over the peer's, seed by seed: both runs of a seed met the machine in about the same state."""
    pairs = [(a, b) for a in ours for b in peer if a.seed == b.seed and not a.error and not b.error]
    if not pairs:
        return f"No ratios to {peer[0].name}: there is no seed with which both ran to the end."
    parts = []
    for column in RATIOS:
        value, _ = COLUMNS[column]
        ratios = [value(a) / value(b) for a, b in pairs]
        parts.append(f"{column.split(',')[0]} {_spread(ratios, '.2f')} times")
    return f"Tunesmith over {peer[0].name}, seed by seed: {'; '.join(parts)}."
