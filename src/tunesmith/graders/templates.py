"""Texts with variables, `{{item.name}}` and `{{sample.output_json.a[0].b}}`, as OpenAI's graders have them."""

from __future__ import annotations

import json
import re
from typing import Any

from tunesmith.errors import InputError
from tunesmith.graders.grade import GradeError
from tunesmith.phrases import did_you_mean, listed
from tunesmith.types import Record

_VARIABLE = re.compile(r"\{\{\s*(.*?)\s*\}\}", re.DOTALL)
_PATH = re.compile(r"(item|sample)((?:\.[^.\[\]\s]+|\[\d+\])+)")
_STEP = re.compile(r"\.([^.\[\]\s]+)|\[(\d+)\]")
MOST_RENDERED = 2**24  # characters: names of few can repeat a long value without end
SAMPLE = ("output_text", "output_json", "output_tools", "choices", "ended", "tokens", "prefix")
"""Fields of a sample."""


def _steps(match: re.Match[str], place: str = "") -> list[str | int]:
    path = _PATH.fullmatch(match[1])
    if path is None:
        raise InputError(
            f"{place}{match[0]}: not a variable. Write {{{{item.FIELD}}}} or {{{{sample.output_text}}}}; parts of a "
            "value follow as .name and [0]."
        )
    return [path[1], *(name or int(number) for name, number in _STEP.findall(path[2]))]


def check(text: str, item: Record | None, place: str) -> None:
    """Raise InputError for a variable that neither a sample nor `item`, the first row, has. `item` None: every
    field of a row is accepted."""
    for match in _VARIABLE.finditer(text):
        space, first, *_ = _steps(match, f"{place}: ")
        known = SAMPLE if space == "sample" else None if item is None else tuple(item)
        if known is not None and first not in known:
            near = did_you_mean(str(first), known)
            raise InputError(f"{place}: {match[0]}: {space} has no {first}.{near} It has {listed(known, 12)}.")


def render(text: str, sample: Record, item: Record) -> str:
    """The text with its variables' values: texts as they are, other values as JSON. Raises GradeError."""
    num_characters = len(text)

    def shown(match: re.Match[str]) -> str:
        nonlocal num_characters
        value = _value(_steps(match), {"sample": sample, "item": item}, match[0])
        words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        num_characters += len(words)
        if num_characters > MOST_RENDERED:
            raise GradeError("exception", f"{match[0]}: with it the text has more than {MOST_RENDERED:,} characters")
        return words

    return _VARIABLE.sub(shown, text)


def _value(steps: list[str | int], value: Any, written: str) -> Any:
    for i, step in enumerate(steps):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            if steps[:2] == ["sample", "output_json"]:
                what = "the answer is not JSON" if i == 2 and value is None else f"the answer's JSON has no {step}"
                raise GradeError("not_json", f"{written}: {what}") from None
            raise GradeError("unknown_variable", f"{written}: there is no {step}") from None
    if value is None and steps == ["sample", "output_json"]:
        raise GradeError("not_json", f"{written}: the answer is not JSON")
    return value
