"""Plain documents: {"text": "..."}, or a .txt or .md file each."""

from __future__ import annotations

from typing import Any

from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "text"
FIELDS = ("text",)
REQUIRED = ("text",)
INPUTS = ("text",)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: all of it is trained."""
    found = RowProblems(source)
    text = found.text(record, "text")
    if answered and isinstance(record.get("text"), str) and not text.strip():
        found.add("no_text", "it holds no text: there is nothing to learn.", "Remove it.")
    return found.problems or Example((Part("text", text, True),), source, NAME, plain=True)
