"""Messages to parts: what every shape made of messages shares. The rules: docs/guide/data.md."""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from tunesmith.data.formats.row_images import IMAGE_TYPES, RowImages, with_images
from tunesmith.data.problems import RowProblems, describe_type
from tunesmith.types import ImageRef, JsonObject, Part, Record

ROLES = {"system", "developer", "user", "assistant", "tool"}
_MEANT = {
    "customer": "user", "human": "user", "agent": "assistant", "ai": "assistant", "bot": "assistant",
    "gpt": "assistant", "model": "assistant",
}  # fmt: skip
"""Roles by names that other programs give them."""
_PLAIN = {"role", "content"}


def parts_of(
    messages: object,
    check: RowProblems,
    *,
    place: str = "messages",
    trained: bool = True,
    images: RowImages | None = None,
) -> list[Part]:
    """One part per message, in order; a message with a problem has a placeholder.

    `trained`: whether answers are trained where the message does not say so by its weight. `images`: of the
    row; None: its shape has no place for any.
    """
    if not isinstance(messages, list):
        check.wrong_type(place, messages, "a list of messages")
        return []
    return [_part(message, check, f"{place}[{i}]", trained, images) for i, message in enumerate(messages)]


def _part(message: object, check: RowProblems, place: str, trained: bool, images: RowImages | None) -> Part:
    if not isinstance(message, dict):
        check.wrong_type(place, message, 'an object such as {"role": "user", "content": "Hi"}')
        return Part("", "", False)
    role = _role(message, check, place)
    is_answer = role == "assistant"
    content = message.get("content")
    if isinstance(content, str) and message.keys() == _PLAIN:
        part = Part(role, content, trained and is_answer)
    else:
        fields = _fields(message, check, place)
        weight = _weight(message, check, place, is_answer)
        text, shown = _content(content, fields, check, place, role=role, images=images)
        is_trained = is_answer and (trained if weight is None else weight and trained)
        part = Part(role, text, is_trained, fields, shown)
    if images is not None and role == "user" and isinstance(content, str):
        part = with_images(part, images, place)
    is_empty = not part.text.strip() and not part.fields.get("tool_calls")
    if part.trained and is_empty and content is not None:
        check.add("empty_answer", f"{place} is an answer without text.", "Write it, or remove the row.")
    return part


def _role(message: Record, check: RowProblems, place: str) -> str:
    role = message.get("role")
    if role == "function":  # what tools were called before they had the name
        return "tool"
    if isinstance(role, str) and role in ROLES:
        return role
    if role is None:
        check.add("missing_field", f"{place}.role is missing.", f"One of {', '.join(sorted(ROLES))}.")
    elif isinstance(role, str):
        meant = f" Write {_MEANT[role.lower()]} for it." if role.lower() in _MEANT else ""
        check.add("unknown_role", f"{place}.role is {role[:40]!r}.", f"One of {', '.join(sorted(ROLES))}.{meant}")
    else:
        check.wrong_type(f"{place}.role", role, "text")
    return ""


def _weight(message: Record, check: RowProblems, place: str, is_answer: bool) -> bool | None:
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        value = weight if isinstance(weight, int | float) else describe_type(weight)
        check.add("bad_weight", f"{place}.weight is {value}.", "1 trains an answer, 0 does not.")
    elif not is_answer and weight == 1:
        check.add("bad_weight", f"{place}.weight is 1, but only the assistant's answers are trained.", "Remove it.")
    return bool(weight)


def _content(
    content: object, fields: Record, check: RowProblems, place: str, *, role: str, images: RowImages | None
) -> tuple[str, tuple[tuple[int, ImageRef], ...]]:
    """The text of a message, and its images, each with the character before which it stands."""
    if not isinstance(content, list):
        return _text(content, fields, check, place), ()
    text, shown = "", list[tuple[int, ImageRef]]()
    for i, piece in enumerate(content):
        inside = f"{place}.content[{i}]"
        if images is not None and isinstance(piece, dict) and piece.get("type") in IMAGE_TYPES:
            image = images.of_part(piece, inside, role)
            shown += [] if image is None else [(len(text), image)]
        else:
            text += _piece(piece, check, inside)
    return text, tuple(shown)


def _text(content: object, fields: Record, check: RowProblems, place: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if not fields.get("tool_calls"):
            check.add(
                "missing_field", f"{place}.content is missing or null.", "Only a message with tool_calls may have none."
            )
        return ""
    check.wrong_type(f"{place}.content", content, "text")
    return ""


def _piece(piece: object, check: RowProblems, place: str) -> str:
    if not isinstance(piece, dict):
        check.wrong_type(place, piece, 'an object such as {"type": "text", "text": "Hi"}')
    elif piece.get("type") == "text" and isinstance(piece.get("text"), str):
        return str(piece["text"])
    elif piece.get("type") == "text":
        check.wrong_type(f"{place}.text", piece.get("text"), "text")
    else:
        kind = str(piece.get("type"))[:40]
        what = "images are read in chats alone (task chat)" if kind in IMAGE_TYPES else "only text and images are read"
        check.add("unsupported_content", f"{place} is of type {kind}: {what}.", "Remove the row.")
    return ""


def _fields(message: Record, check: RowProblems, place: str) -> JsonObject:
    """Fields of a message other than role, content and weight. Null is the same as missing."""
    fields = {
        key: value for key, value in message.items() if value is not None and key not in ("role", "content", "weight")
    }
    call = fields.pop("function_call", None)  # what tool_calls were called before there could be several
    if call is not None:
        fields["tool_calls"] = [{"type": "function", "function": call}]
    if "tool_calls" in fields:
        check_calls(fields["tool_calls"], check, f"{place}.tool_calls")
        if message.get("role") != "assistant":
            check.add("bad_tool_call", f"{place} calls tools, which only the assistant does.", "Remove tool_calls.")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in fields and not isinstance(fields[key], str):
            check.wrong_type(f"{place}.{key}", fields[key], "text")
    return fields


def check_calls(calls: object, check: RowProblems, place: str) -> None:
    """Problems of the tool calls of one message: each has a function with a name and arguments."""
    if not isinstance(calls, list):
        check.wrong_type(place, calls, "a list of calls")
        return
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            check.add(
                "bad_tool_call",
                f"{place}[{i}] names no function.",
                'Write {"function": {"name": ..., "arguments": ...}}.',
            )
            continue
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = orjson.loads(arguments) if arguments.strip() else {}
            except orjson.JSONDecodeError as error:
                check.add("bad_tool_call", f"{place}[{i}]: its arguments are not JSON: {error.msg}.", "Correct them.")
                continue
        if not isinstance(arguments, dict):
            check.add(
                "bad_tool_call", f"{place}[{i}]: its arguments are {describe_type(arguments)}.", "They are an object."
            )


def tools_of(record: Record, check: RowProblems) -> tuple[Record, ...]:
    """The tool definitions of a row: a list, or the text of one; also the older `functions`."""
    tools = record.get("tools")
    functions = record.get("functions")
    if tools is None and functions is not None:
        is_list = isinstance(functions, list)
        tools = [{"type": "function", "function": function} for function in functions] if is_list else functions
    if tools is None or tools == "":
        return ()
    if isinstance(tools, str):
        try:
            tools = orjson.loads(tools)
        except orjson.JSONDecodeError as error:
            check.add("bad_tool", f"tools is text that is not JSON: {error.msg}.", "Correct it.")
            return ()
    if not isinstance(tools, list):
        check.wrong_type("tools", tools, "a list of tools")
        return ()
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            check.add(
                "bad_tool", f"tools[{i}] names no function.", 'Write {"type": "function", "function": {"name": ...}}.'
            )
    return tuple(tools)


def check_order(parts: Sequence[Part], check: RowProblems, *, place: str = "messages", answered: bool = True) -> None:
    """Problems of the order of roles, and of a row without anything to learn."""
    roles = [part.role for part in parts]
    for i, role in enumerate(roles):
        if role in ("system", "developer") and i > 0:
            check.add(
                "roles_out_of_order", f"{place}[{i}] is a {role} message; it must come first.", "Move or remove it."
            )
        if role == "tool" and (i == 0 or roles[i - 1] not in ("assistant", "tool", "")):
            check.add(
                "roles_out_of_order",
                f"{place}[{i}] is a tool's result, but no assistant called one before it.",
                "Add the call.",
            )
    opening = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), None)
    if opening is not None and parts[opening].trained:
        check.add(
            "roles_out_of_order",
            f"{place}[{opening}] is an answer, but nothing was said before it.",
            "Add the user's message, or set the weight of the answer to 0.",
        )
    if "" in roles or check.problems or not answered:
        return
    if "assistant" not in roles:
        check.add("no_answer", "it has no message of the assistant: there is nothing to learn.", "Add one.")
    elif not any(part.trained for part in parts):
        check.add("no_target", "the weight of every answer is 0: there is nothing to learn.", "Remove the row.")


def without_answer(parts: Sequence[Part], check: RowProblems) -> list[Part]:
    """The turns before the last answer, from which a model predicts this answer."""
    end = len(parts)
    while end and parts[end - 1].role == "assistant":
        end -= 1
    if not end and not check.problems:
        check.add("no_question", "it has no message that could be answered.", "Add the user's message.")
    return list(parts[:end])
