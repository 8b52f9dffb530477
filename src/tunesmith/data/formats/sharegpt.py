"""Chats as ShareGPT writes them: {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}."""

from __future__ import annotations

from typing import Any

import orjson

from tunesmith.data.formats._turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Problem, Shape, Source

NAME: Shape = "sharegpt"
FIELDS = ("conversations", "system", "tools")
REQUIRED = ("conversations",)
INPUTS = ("conversations",)
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row; every answer whose weight is not 0 is trained, and so is every call of a tool.

    Not `answered`: up to its last answer.
    """
    found = RowProblems(source)
    messages = as_messages(record.get("conversations"), found)
    if found.problems:
        return found.problems
    tools = tools_of(record, found)
    system = found.optional_text(record, "system")
    if found.problems:
        return found.problems
    first = [{"role": "system", "content": system}] if system else []
    parts = parts_of(first, found) + parts_of(messages, found, place="conversations", trained=answered)
    if not answered:
        parts = without_answer(parts, found)
    place = "system and conversations" if system else "conversations"
    check_order(parts, found, place=place, answered=answered)
    return found.problems or Example(tuple(parts), source, NAME, tools)


def as_messages(turns: Any, found: RowProblems, place: str = "conversations") -> list[dict[str, Any]]:
    """Turns with the names of messages."""
    if isinstance(turns, list):
        return [_message(turn, found, f"{place}[{i}]") for i, turn in enumerate(turns)]
    if turns is None:
        found.add("missing_field", f"{place} is missing or null.", "Remove the row.")
    else:
        found.wrong_type(place, turns, "a list of messages")
    return []


def _message(turn: Any, found: RowProblems, place: str) -> dict[str, Any]:
    """A turn with the names of a message."""
    if not isinstance(turn, dict):
        found.wrong_type(place, turn, 'an object such as {"from": "human", "value": "Hi"}')
        return {}
    speaker, value = turn.get("from"), turn.get("value")
    if speaker is None and "role" in turn:  # as OpenAI writes it
        return turn
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if speaker is None:
        found.add("missing_field", f"{place}.from is missing.", f"One of {', '.join(ROLES)}.")
    elif not isinstance(speaker, str):
        found.wrong_type(f"{place}.from", speaker, "text")
    elif speaker not in ROLES:
        found.add("unknown_role", f"{place}.from is {speaker[:40]!r}.", f"One of {', '.join(ROLES)}.")
    elif value is None:
        found.add("missing_field", f"{place}.value is missing or null.", "Write it, or remove the row.")
    elif not isinstance(value, str):
        found.wrong_type(f"{place}.value", value, "text")
    elif speaker == "function_call":
        return {**rest, "role": "assistant", "content": "", "tool_calls": _calls(value, found, place)}
    return {**rest, "role": ROLES.get(str(speaker), ""), "content": value}


def _calls(value: str, found: RowProblems, place: str) -> list[dict[str, Any]]:
    """The calls written as JSON in a function_call turn: one, or a list of them."""
    try:
        calls = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        fix = 'Write {"name": ..., "arguments": {...}}.'
        found.add("bad_tool_call", f"{place}.value is a function call, but not JSON: {error.msg}.", fix)
        return []
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
