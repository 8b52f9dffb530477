"""Answers that are wanted or not: {"prompt": "...", "completion": "...", "label": true}, or messages with a label."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.data.formats import messages, prompt_completion
from tunesmith.types import Example, Problem, Shape, Source

NAME: Shape = "unpaired"
FIELDS = ("prompt", "completion", "label", "messages", "tools")
REQUIRED = ("prompt", "completion", "label")
INPUTS = ("prompt",)


def matches(record: dict[str, Any]) -> bool:
    return isinstance(record.get("label"), bool) and ("completion" in record or "messages" in record)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and as its one branch what is trained, with 1 where it is wanted, else 0."""
    label = record.get("label")
    if answered and not isinstance(label, bool):
        return [Problem(source, "bad_label", f"label is {str(label)[:40]}.", "true: the answer is wanted; or false.")]
    module: Any = messages if "messages" in record else prompt_completion
    found: Example | list[Problem] = module.parse(record, source, answered=answered)
    if not answered or not isinstance(found, Example):
        return found
    first = next((i for i, part in enumerate(found.parts) if part.trained), len(found.parts))
    prompt, answer = found.parts[:first], found.parts[first:]
    branches = (answer,) if answer else ()
    return replace(found, parts=prompt, shape=NAME, branches=branches, values=(float(bool(label)),))
