"""Prints the report of a check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from tunesmith.cli.errors import print_problems
from tunesmith.cli.render import ACCENT, MUTED, percent, sample_row, visible
from tunesmith.cli.streams import console
from tunesmith.formatting import mix_text, plural

if TYPE_CHECKING:
    from tunesmith.data.check import CheckReport, TokenStats

BAR = 32
"""Width of the longest bar of the histogram."""
MOST_CLASSES = 30
"""Classes drawn one by one."""


def draw(report: CheckReport, mix: Sequence[Mapping[str, Any]] = ()) -> None:
    """Problems first, then files, tokens and a first row, then the verdict."""
    screen = console()
    errors = [problem for problem in report.problems if problem.severity == "error"]
    warnings = [problem for problem in report.problems if problem.severity == "warning"]
    print_problems(errors, nums=report.errors, stderr=False)
    print_problems(warnings, nums=report.warnings, stderr=False)
    if report.problems:
        _say(screen, "")
    for what, counts in (("error", report.errors), ("warning", report.warnings)):
        if counts:
            by_code = ", ".join(f"{number:,} {code}" for code, number in sorted(counts.items()))
            _say(screen, f"{plural(sum(counts.values()), what)}: {by_code}")
    for file in report.files:
        shape = f"{file.shape} in {file.format}" if file.shape else file.format or "unreadable"
        _say(screen, f"{file.path}: {shape}: {file.usable:,} of {plural(file.rows, 'row')} can be used")
    if mix:
        _say(screen, f"mix, before rows are held out: {mix_text(mix)}")
    for side, stats in report.tokens.items():
        _tokens(screen, side, stats)
    _labels(screen, report)
    for spans in report.first_rows[:1]:
        screen.print("", sample_row(spans), "", sep="\n")
    _say(screen, f"held out: {plural(report.held_out, 'row')}")
    for note in report.notes:
        _say(screen, f"note: {note}")
    for refusal in report.refusals:
        screen.print(Text(f"refused: {visible(refusal)}", style="bold red"))
    if report.ok:
        _verdict(screen, report)


def _verdict(screen: Console, report: CheckReport) -> None:
    """The last line: held-out rows that are trained make what is measured worth less, or nothing."""
    seen, held = report.overlap.num, report.held_out
    if not seen:
        screen.print(Text("can be trained on", style="bold green"))
        return
    worth = "worthless" if 2 * seen >= held else "too good"
    which = f"{seen:,} of {plural(held, 'held-out row')} {'is' if seen == 1 else 'are'} also trained"
    text = f"can be trained on, but the measures will be {worth}: {which}"
    screen.print(Text(text, style="bold yellow"))


def _labels(screen: Console, report: CheckReport) -> None:
    """Classes with a bar each, the most frequent ones where there are many."""
    if not report.labels:
        return
    words = {"one": "one class a row", "many": "any number of classes a row", "tags": "a tag for each word"}
    _say(screen, f"labels: {len(report.labels):,} classes, {words[str(report.label_kind)]}")
    most = max(number for _, number in report.labels)
    listed = report.labels
    if len(listed) > MOST_CLASSES:
        listed = tuple(sorted(listed, key=lambda label: -label[1])[:MOST_CLASSES])
    for name, number in listed:
        bar = "█" * max(round(number / most * BAR), 1 if number else 0)
        shown = visible(name if len(name) <= 18 else f"{name[:17]}…")
        screen.print(Text.assemble((f"{shown:>18} ", MUTED), (f"{bar:<{BAR}}", ACCENT), f" {number:,}"))
    if len(listed) < len(report.labels):
        _say(screen, f"and {len(report.labels) - len(listed):,} rarer ones")


def _tokens(screen: Console, side: str, stats: TokenStats) -> None:
    share = percent(stats.trained / stats.tokens)
    _say(
        screen,
        f"{side}: {stats.tokens:,} tokens, {stats.trained:,} of them trained ({share}); a row has {stats.shortest:,} "
        f"to {stats.longest:,}, half have {stats.median:,} or less, 95 % have {stats.p95:,} or less",
    )
    most = max(stats.counts)
    for start, end, number in zip(stats.edges, stats.edges[1:], stats.counts, strict=False):
        bar = "█" * max(round(number / most * BAR), 1 if number else 0)
        label = f"{start:>8,}–{end - 1:<8,}"
        screen.print(Text.assemble((label, MUTED), (f"{bar:<{BAR}}", ACCENT), f" {number:,}"))


def _say(screen: Console, text: str) -> None:
    screen.print(Text(visible(text)))
