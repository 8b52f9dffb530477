"""Documents and their summaries: {"document": "...", "summary": "..."}."""

from __future__ import annotations

from typing import Any

from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "document_summary"
FIELDS = ("document", "summary")
REQUIRED = ("document", "summary")
INPUTS = ("document",)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: the summary is trained."""
    found = RowProblems(source)
    parts = [Part("document", found.text(record, "document"), False)]
    if answered:
        parts.append(Part("summary", found.answer(record, "summary"), True))
    return found.problems or Example(tuple(parts), source, NAME, plain=True)
