"""Pairs: {"prompt": "...", "completion": "..."}, both text, or both lists of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.formats._turns import check_order, parts_of, tools_of
from tunesmith.data.problems import RowProblems, describe_type
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "prompt_completion"
FIELDS = ("prompt", "completion", "tools")
REQUIRED = ("prompt", "completion")
INPUTS = ("prompt",)


def matches(record: dict[str, Any]) -> bool:
    return "prompt" in record or "completion" in record


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: the completion is trained; in messages, its answers are."""
    found = RowProblems(source)
    prompt, completion = record.get("prompt"), record.get("completion")
    tools = tools_of(record, found)
    if not answered:
        return prompt_alone(prompt, tools, found, NAME)
    if isinstance(prompt, list) and isinstance(completion, list):
        before = parts_of(prompt, found, place="prompt", trained=False)
        answers = parts_of(completion, found, place="completion")
        check_order([*before, *answers], found, place="prompt and completion")
        return found.problems or Example((*before, *answers), source, NAME, tools)
    if isinstance(prompt, list) != isinstance(completion, list) and None not in (prompt, completion):
        message = f"prompt is {describe_type(prompt)}, but completion is {describe_type(completion)}."
        found.add("wrong_type", message, "Both are text, or both are lists of messages.")
        return found.problems
    parts = (
        Part("user", found.text(record, "prompt"), False),
        Part("assistant", found.answer(record, "completion"), True),
    )
    return found.problems or Example(parts, source, NAME, tools, plain=True)


def prompt_alone(
    prompt: Any, tools: tuple[Mapping[str, Any], ...], found: RowProblems, shape: Shape
) -> Example | list[Problem]:
    """The example of a prompt that waits for its answer."""
    if isinstance(prompt, list):
        before = parts_of(prompt, found, place="prompt", trained=False)
        check_order(before, found, place="prompt", answered=False)
        return found.problems or Example(tuple(before), found.source, shape, tools)
    parts = (Part("user", found.text({"prompt": prompt}, "prompt"), False),)
    return found.problems or Example(parts, found.source, shape, tools, plain=True)
