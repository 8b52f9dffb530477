"""Values as a person reads them, on a terminal and in a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def duration(seconds: float) -> str:
    """A time span: 42 s, 3:05 min, 2:10:00 h."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def knob(value: Any) -> str:
    """The value of a knob as it would be written: 0.0005, lora (rank 16, alpha 32); of a group what is not empty."""
    if isinstance(value, Mapping):
        shown = {key: item for key, item in value.items() if key != "name" and item not in ((), [], {})}
        rest = ", ".join(f"{key} {knob(item)}" for key, item in shown.items())
        name = str(value.get("name", ""))
        return f"{name} ({rest})" if name and rest else name or rest
    if isinstance(value, (list, tuple)):
        return ", ".join(map(knob, value))
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
