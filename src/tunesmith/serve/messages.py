"""Conversations as requests bring them, held to the rules that training rows are held to (docs/data.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.formats import messages
from tunesmith.serve.parameters import refuse
from tunesmith.types import Source


def as_one_text(message: Any, place: str) -> dict[str, Any]:
    """A message without what is null, and with its parts joined, as they are in training.

    Raises PydanticCustomError for a part that is no text.
    """
    if not isinstance(message, dict):
        raise refuse(
            "invalid_value", place, f'{place}: should be an object such as {{"role": "user", "content": "Hi"}}.'
        )
    said = {name: value for name, value in message.items() if value is not None or name == "content"}
    if isinstance(said.get("content"), list):
        parts = enumerate(said["content"])
        said["content"] = "".join(_text(part, f"{place}.content[{i}]") for i, part in parts)
    return said


def _text(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        message = f"{place}: a part of type {str(kind)[:40]!r}: models here read text."
        raise refuse("unsupported_content", place, message)
    if not isinstance(part.get("text"), str):
        raise refuse("invalid_value", place, f"{place}: a part without a text.")
    return str(part["text"])


def check(said: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> None:
    """Raises PydanticCustomError with everything that a training row of these messages would be refused for."""
    record = {"messages": [dict(message) for message in said], "tools": list(tools)}
    found = messages.parse(record, Source("messages", 1), answered=False)
    if isinstance(found, list):
        raise refuse("invalid_messages", "messages", " ".join(problem.message for problem in found[:10]))
