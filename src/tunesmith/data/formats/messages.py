"""Chats as OpenAI writes them: {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}."""

from __future__ import annotations

from typing import Any

from tunesmith.data.formats._turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.formats.sharegpt import as_messages
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Problem, Shape, Source

NAME: Shape = "messages"
FIELDS = ("messages", "tools", "functions")
REQUIRED = ("messages",)
INPUTS = ("messages",)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row; every answer whose weight is not 0 is trained. Not `answered`: up to its last answer."""
    found = RowProblems(source)
    if record.get("messages") is None:
        found.add("missing_field", "messages is missing or null.", "Remove the row.")
        return found.problems
    messages, tools = record["messages"], tools_of(record, found)
    if isinstance(messages, list) and any(isinstance(one, dict) and "from" in one for one in messages):
        messages = as_messages(messages, found, "messages")  # as ShareGPT writes them
        if found.problems:
            return found.problems
    parts = parts_of(messages, found, trained=answered)
    if not answered:
        parts = without_answer(parts, found)
    check_order(parts, found, answered=answered)
    return found.problems or Example(tuple(parts), source, NAME, tools)
