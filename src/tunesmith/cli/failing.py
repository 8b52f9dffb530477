"""An error as one clean block on stderr and an exit code; no traceback unless TUNESMITH_DEBUG=1 asks for it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.cli.stopping import INTERRUPTED
from tunesmith.errors import DataError, Stopped, TunesmithError, is_out_of_memory

if TYPE_CHECKING:
    from tunesmith.types import Problem

FAILED, BAD_INPUT = 1, 2
SHOWN_PROBLEMS = 20
DEBUG = "TUNESMITH_DEBUG"


def report(error: BaseException, *, as_json: bool = False) -> int:
    """Tell the person (and with `as_json` the machine on stdout) what went wrong; the exit code."""
    if os.environ.get(DEBUG) == "1":
        traceback.print_exception(error, file=sys.stderr)
    if as_json and not isinstance(error, KeyboardInterrupt):
        from tunesmith.cli.output import json_line

        json_line(as_values(error))
    if isinstance(error, KeyboardInterrupt):
        _print("interrupted", style="yellow")
        return INTERRUPTED
    if isinstance(error, Stopped):
        _print(str(error), style="yellow")
        return error.exit_code
    if isinstance(error, DataError) and error.problems:
        print_problems(error.problems)
    for line in explained(error):
        _print(line, style="bold red")
    return error.exit_code if isinstance(error, TunesmithError) else FAILED


def explained(error: BaseException) -> list[str]:
    """What to tell a person: our own errors speak for themselves, others get a name and a way out."""
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


def print_problems(problems: Sequence[Problem], *, num: int | None = None, stderr: bool = True) -> None:
    """`file:line: code: message fix`, the first twenty and how many more there are of `num`."""
    shown = problems[:SHOWN_PROBLEMS]
    for problem in shown:
        _print(str(problem), style="red" if problem.severity == "error" else "yellow", stderr=stderr)
    num = len(problems) if num is None else num
    if num > len(shown):
        listed = "all with --json" if num == len(problems) else f"--json lists {len(problems):,} in all"
        _print(f"and {num - len(shown):,} more ({listed})", style="bold", stderr=stderr)


def _print(text: str, *, style: str, stderr: bool = True) -> None:
    from rich.text import Text

    from tunesmith.cli.output import console
    from tunesmith.cli.text import visible

    console(stderr=stderr).print(Text(visible(text), style=style), soft_wrap=True)
