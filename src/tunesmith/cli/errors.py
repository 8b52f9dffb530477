"""Errors as one block on stderr and an exit code; no traceback unless TUNESMITH_DEBUG=1."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from tunesmith.cli.signals import INTERRUPTED
from tunesmith.errors import DataError, Stopped, TunesmithError, is_out_of_memory
from tunesmith.types import JsonObject

if TYPE_CHECKING:
    from tunesmith.types import Problem

FAILED_CODE = 1
SHOWN_LINES = 20
MOST_ALIKE = 3
"""Problems of one kind in one file that are printed one by one."""
OF_THE_FILE = ("invalid_utf8",)
"""Problems of rows that have one cause for the whole file, whatever byte shows it."""
DEBUG = "TUNESMITH_DEBUG"


def report(error: BaseException, *, as_json: bool = False) -> int:
    """Print an error on stderr, with `as_json` also as JSON on stdout; returns the exit code.

    One of several ranks leaves it to its agent too, and prints only what no other rank prints.
    """
    from tunesmith.parallel.launch import ending, record_failure

    code = error.exit_code if isinstance(error, TunesmithError) else FAILED_CODE
    code, prints = ending(error, code)
    record_failure(error, code, str(error), is_printed=prints)
    if not prints:
        return code
    printed = _report(error, as_json=as_json)
    return 0 if code == 0 else printed


def _report(error: BaseException, *, as_json: bool) -> int:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error, file=sys.stderr)
    if as_json and not isinstance(error, KeyboardInterrupt):
        from tunesmith.cli.streams import json_line

        json_line(as_values(error))
    if isinstance(error, KeyboardInterrupt):
        _print("interrupted", style="yellow")
        return INTERRUPTED
    if isinstance(error, Stopped):
        _print(str(error), style="yellow")
        return error.exit_code
    all_said = False
    if isinstance(error, DataError) and error.problems:
        print_problems(error.problems)
        all_said = str(error) == "\n".join(map(str, error.problems))
    for line in explained(error)[int(all_said) :]:
        _print(line, style="bold red")
    return error.exit_code if isinstance(error, TunesmithError) else FAILED_CODE


def explained(error: BaseException) -> list[str]:
    """The lines for a person: our own errors as they are, others with a name and a way out."""
    if isinstance(error, TunesmithError):
        return [f"error: {error}", *([f"More: tunesmith explain {error.topic}"] if error.topic else [])]
    kind = type(error).__name__
    text = " ".join(str(error).split()) or "no message"
    if is_out_of_memory(error):
        return [
            f"error: out of memory: {text[:300]}",
            "Lower train.tokens_per_pass (same update), set train.checkpointed_layers, or use method: lora.",
            "More: tunesmith explain out-of-memory",
        ]
    if isinstance(error, OSError) and error.filename:
        return [f"error: {error.filename}: {error.strerror}"]
    return [
        f"error: {kind}: {text[:600]}",
        f"This is a fault in tunesmith or below it. Run again with {DEBUG}=1 to see where, and please report it.",
    ]


def as_values(error: BaseException) -> JsonObject:
    """The error as one JSON object."""
    values: JsonObject = {"kind": "error", "code": type(error).__name__, "message": str(error)}
    if topic := getattr(error, "topic", ""):
        values["topic"] = topic
    if ways := getattr(error, "ways", ()):
        values["ways"] = [asdict(way) for way in ways]
    if isinstance(error, DataError):
        values["problems"] = [problem_values(problem) for problem in error.problems]
    return values


def problem_values(problem: Problem) -> JsonObject:
    return {
        "file": problem.source.path,
        "line": problem.source.line,
        "code": problem.code,
        "severity": problem.severity,
        "message": problem.message,
        "fix": problem.fix,
    }


def print_problems(
    problems: Sequence[Problem],
    *,
    nums: Mapping[str, int] | None = None,
    rows: Mapping[str, int] | None = None,
    stderr: bool = True,
) -> None:
    """`file:line: code: message fix`: what several rows of a file share once, three of each kind in a file,
    twenty lines at most, and how many more there are.

    `nums`: how many there are by code, listed or not. `rows`: how many a file has, by its path.
    """
    alike: dict[tuple[str, str, str], list[Problem]] = {}
    for problem in problems:
        cause = "" if problem.code in OF_THE_FILE else f"{problem.message} {problem.fix}"
        alike.setdefault((problem.source.path, problem.code, cause), []).append(problem)
    kinds: Counter[tuple[str, str]] = Counter()
    num_lines = num_shown = num_cut = 0
    for (path, code, _), group in alike.items():
        kinds[path, code] += 1
        if kinds[path, code] > MOST_ALIKE or num_lines == SHOWN_LINES:
            continue
        first, size = group[0], len(group)
        if nums and sum(other[1] == code for other in alike) == 1:
            size = max(size, nums.get(code, 0))  # of which not all are listed
        lines = ", ".join(str(problem.source.line) for problem in group[:MOST_ALIKE])
        place = str(first.source) if size == 1 else f"{path}:{lines}"
        if 1 < size == (rows or {}).get(path):
            place = f"{path}: all {size:,} rows"
        elif size > MOST_ALIKE:
            place, num_cut = f"{place} and {size - MOST_ALIKE:,} more", num_cut + size - MOST_ALIKE
        line = str(first).replace(str(first.source), place, 1)
        _print(line, style="red" if first.severity == "error" else "yellow", stderr=stderr)
        num_lines, num_shown = num_lines + 1, num_shown + size
    num = sum(nums.values()) if nums else len(problems)
    if (left := num - num_shown) > 0:
        most = "all" if num == len(problems) else f"the first {len(problems):,}"
        _print(f"and {left:,} more (--json lists {most})", style="bold", stderr=stderr)
    elif num_cut:
        _print("--json lists every line", style="bold", stderr=stderr)


def _print(text: str, *, style: str, stderr: bool = True) -> None:
    from rich.text import Text

    from tunesmith.cli.streams import console
    from tunesmith.phrases import visible

    console(stderr=stderr).print(Text(visible(text), style=style), soft_wrap=True)
