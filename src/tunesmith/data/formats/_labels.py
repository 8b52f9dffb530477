"""Labels as texts: what every shape that has classes shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tunesmith.data.problems import RowProblems


def labels_of(values: Sequence[Any], found: RowProblems, place: str) -> tuple[str, ...]:
    """The names in a list of labels."""
    return tuple(label_of(value, found, f"{place}[{i}]") for i, value in enumerate(values))


def label_of(value: Any, found: RowProblems, place: str) -> str:
    """The name of one label: a text byte for byte, a number as JSON writes it, true or false."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return repr(value)
    if isinstance(value, str):
        found.add("bad_label", f"{place} is empty.", "Write it, or remove the row.")
    elif isinstance(value, float):
        found.add("bad_label", f"{place} is {value}.", "Write a number, or remove the row.")
    elif value is None:
        found.add("bad_label", f"{place} is null.", "Write it, or remove it.")
    else:
        found.wrong_type(place, value, "text or a number")
    return ""
