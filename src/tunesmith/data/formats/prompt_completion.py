"""Pairs: {"prompt": "...", "completion": "..."}, both text, or both lists of messages."""

from __future__ import annotations

from typing import Any

from tunesmith.data.findings import Findings, kind_of
from tunesmith.data.formats._turns import check_order, parts_of, tools_of
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "prompt_completion"
FIELDS = ("prompt", "completion", "tools")
REQUIRED = ("prompt", "completion")


def matches(record: dict[str, Any]) -> bool:
    return "prompt" in record or "completion" in record


def parse(record: dict[str, Any], source: Source) -> Example | list[Problem]:
    """The example of one row: the completion is trained; in messages, its answers are."""
    found = Findings(source)
    prompt, completion = record.get("prompt"), record.get("completion")
    tools = tools_of(record, found)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = parts_of(prompt, found, place="prompt", trained=False)
        answered = parts_of(completion, found, place="completion")
        check_order([*asked, *answered], found, place="prompt and completion")
        return found.problems or Example((*asked, *answered), source, NAME, tools)
    if isinstance(prompt, list) != isinstance(completion, list) and None not in (prompt, completion):
        message = f"prompt is {kind_of(prompt)}, but completion is {kind_of(completion)}."
        found.add("wrong_type", message, "Both are text, or both are lists of messages.")
        return found.problems
    parts = (
        Part("user", found.text(record, "prompt"), False),
        Part("assistant", found.text(record, "completion"), True),
    )
    if isinstance(completion, str) and not completion.strip():
        found.add("empty_answer", "completion is empty.", "Write it, or remove the row.")
    return found.problems or Example(parts, source, NAME, tools, plain=True)
