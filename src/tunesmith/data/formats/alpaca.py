"""Tasks as Alpaca writes them: {"instruction": "...", "input": "...", "output": "..."}, perhaps system and history."""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats._turns import parts_of
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "alpaca"
FIELDS = ("instruction", "input", "output", "system", "history")
REQUIRED = ("instruction", "output")
INPUTS = ("instruction",)


def matches(record: dict[str, Any]) -> bool:
    return "instruction" in record


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: instruction, a blank line and input are the user's message; the output is trained.

    Answers in `history` are trained too.
    """
    found = RowProblems(source)
    instruction = found.text(record, "instruction")
    extra = found.optional_text(record, "input")
    system = found.optional_text(record, "system")
    parts = [Part("system", system, False)] if system else []
    parts += _history(record.get("history"), found)
    parts.append(Part("user", f"{instruction}\n\n{extra}" if extra else instruction, False))
    if answered:
        parts.append(Part("assistant", found.answer(record, "output"), True))
    return found.problems or Example(tuple(parts), source, NAME)


def _history(history: Any, found: RowProblems) -> list[Part]:
    if not history:
        return []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        found.add("wrong_type", "history is not a list of [question, answer].", "Write it so.")
        return []
    pairs = [zip(("user", "assistant"), pair, strict=True) for pair in history]
    return parts_of([{"role": role, "content": text} for pair in pairs for role, text in pair], found, place="history")
