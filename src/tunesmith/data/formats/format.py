"""A shape that a row can have: its fields, and how they become an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tunesmith.types import Example, JsonObject, Problem, Record, Shape, Source


class ParseRow(Protocol):
    """The example of one row, or its problems. Not `answered`: what is to be predicted is not read."""

    def __call__(self, record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]: ...


@dataclass(frozen=True, slots=True)
class Format:
    """A row of `data.formats.FORMATS`."""

    name: Shape
    parse: ParseRow
    fields: tuple[str, ...]
    """Every field that it knows."""
    required: tuple[str, ...]
    inputs: tuple[str, ...]
    """Fields that are enough for an answer."""
    matches: Callable[[Record], bool] | None = None
    """Whether a row has this shape; None: if it has the required fields."""
