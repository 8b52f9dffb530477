"""The shapes that a row can have, found by the names of its fields. To add one: a file, and a row in FORMATS."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tunesmith.data.formats import alpaca, messages, prompt_completion, sharegpt
from tunesmith.types import Shape

FORMATS: Mapping[Shape, ModuleType] = {
    module.NAME: module for module in (messages, sharegpt, alpaca, prompt_completion)
}
"""Each has NAME, FIELDS it knows, those REQUIRED, matches(record) and parse(record, source). The first match counts."""

FIELDS = tuple(dict.fromkeys(field for module in FORMATS.values() for field in module.FIELDS))
"""Every field that a shape knows: what data.columns may name."""


def find_shape(record: Mapping[str, Any]) -> Shape | None:
    """The shape whose fields a row has; None if it has those of no shape."""
    return next((name for name, module in FORMATS.items() if module.matches(record)), None)
