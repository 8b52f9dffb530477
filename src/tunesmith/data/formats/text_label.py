"""Texts, or pairs of texts, and their classes or number: {"text": "...", "label": "...", "text_pair": "..."}."""

from __future__ import annotations

from typing import Any

from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "text_label"
FIELDS = ("text", "label", "text_pair")
REQUIRED = ("text", "label")
INPUTS = ("text",)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row. A label is a text, a number, true or false; a list of them says which classes hold."""
    found = RowProblems(source)
    parts = [Part("text", found.text(record, "text"), False)]
    if record.get("text_pair") is not None:
        parts.append(Part("text_pair", found.text(record, "text_pair"), False))
    label = record.get("label")
    labels: tuple[str, ...] = ()
    if answered and label is None:
        found.text(record, "label")
    elif answered:
        labels = found.labels(label, "label") if isinstance(label, list) else (found.label(label, "label"),)
        twice = next((name for i, name in enumerate(labels) if name in labels[:i]), None)
        if twice:
            found.add("bad_label", f"label names {twice[:40]!r} twice.", "Name it once.")
    many = answered and isinstance(label, list)
    return found.problems or Example(tuple(parts), source, NAME, labels=labels, many=many)
