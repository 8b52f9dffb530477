"""Errors as one block on stderr and an exit code; no traceback unless TUNESMITH_DEBUG=1."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.cli.signals import INTERRUPTED
from tunesmith.errors import DataError, Stopped, TunesmithError, is_out_of_memory

if TYPE_CHECKING:
    from tunesmith.types import Problem

FAILED, BAD_INPUT = 1, 2
SHOWN_LINES = 20
MOST_ALIKE = 3
"""Problems of one kind in one file that are printed one by one."""
LINES_NAMED = 10
DEBUG = "TUNESMITH_DEBUG"


def report(error: BaseException, *, as_json: bool = False) -> int:
    """Print an error on stderr, with `as_json` also as JSON on stdout; returns the exit code.

    One of several ranks leaves it to its agent too, and prints only what no other rank prints.
    """
    from tunesmith.parallel.launch import ending, record_failure

    code = error.exit_code if isinstance(error, TunesmithError) else FAILED
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
    if isinstance(error, DataError) and error.problems:
        print_problems(error.problems)
        if str(error) == "\n".join(map(str, error.problems)):
            return error.exit_code  # all is said
    for line in explained(error):
        _print(line, style="bold red")
    return error.exit_code if isinstance(error, TunesmithError) else FAILED


def explained(error: BaseException) -> list[str]:
    """The lines for a person: our own errors as they are, others with a name and a way out."""
    if isinstance(error, TunesmithError):
        return [f"error: {error}"]
    kind = type(error).__name__
    text = " ".join(str(error).split()) or "no message"
    if is_out_of_memory(error):
        return [
            f"error: out of memory: {text[:300]}",
            "Lower train.tokens_per_pass (same update), set train.checkpointed_layers, or use method: lora.",
        ]
    if isinstance(error, OSError) and error.filename:
        return [f"error: {error.filename}: {error.strerror}"]
    return [
        f"error: {kind}: {text[:600]}",
        f"This is a fault in tunesmith or below it. Run again with {DEBUG}=1 to see where, and please report it.",
    ]


def as_values(error: BaseException) -> dict[str, Any]:
    """The error as one JSON object."""
    values: dict[str, Any] = {"kind": "error", "code": type(error).__name__, "message": str(error)}
    if isinstance(error, DataError):
        values["problems"] = [problem_values(problem) for problem in error.problems]
    return values


def problem_values(problem: Problem) -> dict[str, Any]:
    return {
        "file": problem.source.path,
        "line": problem.source.line,
        "code": problem.code,
        "severity": problem.severity,
        "message": problem.message,
        "fix": problem.fix,
    }


def print_problems(problems: Sequence[Problem], *, nums: Mapping[str, int] | None = None, stderr: bool = True) -> None:
    """`file:line: code: message fix`, the first twenty lines and how many problems there are beyond those.

    More than three problems of one kind in a file are one line. `nums`: how many there are by code, listed or not.
    """
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        groups.setdefault((problem.source.path, problem.code), []).append(problem)
    codes = Counter(code for _, code in groups)
    shown: list[tuple[int, str, str]] = []
    for (_, code), group in groups.items():
        num = max(len(group), nums[code]) if nums and codes[code] == 1 else len(group)
        shown += [(1, str(one), one.severity) for one in group] if num <= MOST_ALIKE else [_together(group, num)]
    for _, text, severity in shown[:SHOWN_LINES]:
        _print(text, style="red" if severity == "error" else "yellow", stderr=stderr)
    num = sum(nums.values()) if nums else len(problems)
    left = num - sum(number for number, *_ in shown[:SHOWN_LINES])
    if left > 0:
        listed = "all with --json" if num == len(problems) else f"--json lists {len(problems):,} in all"
        _print(f"and {left:,} more ({listed})", style="bold", stderr=stderr)


def _together(group: Sequence[Problem], num: int) -> tuple[int, str, str]:
    """Number, line and severity of all problems of one kind in one file."""
    first = group[0]
    lines = [problem.source.line for problem in group]
    if lines == list(range(lines[0], lines[0] + num)):
        where = f", in lines {lines[0]:,} to {lines[-1]:,}"
    else:
        named = ", ".join(map(str, lines[:LINES_NAMED]))
        where = f", in lines {named}{', ...' if num > LINES_NAMED else ''}"
    what = "" if all(problem.message == first.message for problem in group) else ", the first"
    text = f"{first.source}: {first.code}: {num:,} times{where if any(lines) else ''}{what}: {first.message}"
    return num, f"{text} {first.fix}".rstrip(), first.severity


def _print(text: str, *, style: str, stderr: bool = True) -> None:
    from rich.text import Text

    from tunesmith.cli.streams import console
    from tunesmith.phrases import visible

    console(stderr=stderr).print(Text(visible(text), style=style), soft_wrap=True)
