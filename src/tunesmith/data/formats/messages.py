"""Chats as OpenAI writes them: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}."""

from __future__ import annotations

from typing import Any

from tunesmith.data.findings import Findings
from tunesmith.data.formats._turns import check_order, parts_of, tools_of
from tunesmith.types import Example, Problem, Shape, Source

NAME: Shape = "messages"
FIELDS = ("messages", "tools")
REQUIRED = ("messages",)


def matches(record: dict[str, Any]) -> bool:
    return "messages" in record


def parse(record: dict[str, Any], source: Source) -> Example | list[Problem]:
    """The example of one row; every answer whose weight is not 0 is trained."""
    found = Findings(source)
    if record.get("messages") is None:
        found.add("missing_field", "messages is missing or null.", "Remove the row.")
        return found.problems
    tools = tools_of(record, found)
    parts = parts_of(record["messages"], found)
    check_order(parts, found)
    return found.problems or Example(tuple(parts), source, NAME, tools)
