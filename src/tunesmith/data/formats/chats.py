"""Conversations: messages as OpenAI writes them, conversations as ShareGPT does, Alpaca's tasks, and plain pairs.

{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
{"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
{"instruction": "...", "input": "...", "output": "..."}, perhaps with system and history
{"prompt": "...", "completion": "..."}, both text, or both lists of messages
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import orjson

from tunesmith.data.formats.format import Format
from tunesmith.data.formats.turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.problems import RowProblems, describe_type, names, paste
from tunesmith.types import Example, Part, Problem, Shape, Source

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""Roles by ShareGPT's names."""
_PREFERRED = ("chosen", "rejected")
"""Fields of preferences, which have a prompt too."""


def parse_chat(
    record: dict[str, Any],
    source: Source,
    *,
    answered: bool = True,
    key: Literal["messages", "conversations"] = "messages",
) -> Example | list[Problem]:
    """The example of one row; every answer whose weight is not 0 is trained. Not `answered`: up to its last answer."""
    found = RowProblems(source)
    turns, system, place = record.get(key), "", key
    if turns is None:
        found.add("missing_field", f"{key} is missing or null.", "Remove the row.")
    elif key == "conversations" or (
        isinstance(turns, list) and any(isinstance(one, dict) and "from" in one for one in turns)
    ):
        turns = as_messages(turns, found, key)
    if found.problems:
        return found.problems
    tools = tools_of(record, found)
    parts = parts_of(turns, found, place=key, trained=answered)
    if key == "conversations" and (system := found.optional_text(record, "system")):
        parts.insert(0, Part("system", system, False))
    if not answered:
        parts = without_answer(parts, found)
    check_order(parts, found, place=f"system and {place}" if system else place, answered=answered)
    return found.problems or Example(tuple(parts), source, "sharegpt" if key == "conversations" else key, tools)


def as_messages(turns: Any, found: RowProblems, place: str = "conversations") -> list[dict[str, Any]]:
    """ShareGPT's turns with the names of messages."""
    if isinstance(turns, list):
        return [_message(turn, found, f"{place}[{i}]") for i, turn in enumerate(turns)]
    if turns is None:
        found.add("missing_field", f"{place} is missing or null.", "Remove the row.")
    else:
        found.wrong_type(place, turns, "a list of messages")
    return []


def _message(turn: Any, found: RowProblems, place: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        found.wrong_type(place, turn, 'an object such as {"from": "human", "value": "Hi"}')
        return {}
    speaker, value = turn.get("from"), turn.get("value")
    if speaker is None and "role" in turn:  # as OpenAI writes it
        return turn
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if speaker is None:
        found.add("missing_field", f"{place}.from is missing.", f"One of {', '.join(SPEAKERS)}.")
    elif not isinstance(speaker, str):
        found.wrong_type(f"{place}.from", speaker, "text")
    elif speaker not in SPEAKERS:
        found.add("unknown_role", f"{place}.from is {speaker[:40]!r}.", f"One of {', '.join(SPEAKERS)}.")
    elif value is None:
        found.add("missing_field", f"{place}.value is missing or null.", "Write it, or remove the row.")
    elif not isinstance(value, str):
        found.wrong_type(f"{place}.value", value, "text")
    elif speaker == "function_call":
        return {**rest, "role": "assistant", "content": "", "tool_calls": _calls(value, found, place)}
    return {**rest, "role": SPEAKERS.get(str(speaker), ""), "content": value}


def _calls(value: str, found: RowProblems, place: str) -> list[dict[str, Any]]:
    """The calls written as JSON in a function_call turn: one, or a list of them."""
    try:
        calls = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        fix = 'Write {"name": ..., "arguments": {...}}.'
        found.add("bad_tool_call", f"{place}.value is a function call, but not JSON: {error.msg}.", fix)
        return []
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _parse_alpaca(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: instruction, a blank line and input are the user's message; the output is trained.

    Answers in `history` are trained too.
    """
    found = RowProblems(source)
    instruction = found.text(record, "instruction")
    extra = found.optional_text(record, "input")
    system = found.optional_text(record, "system")
    parts = [Part("system", system, False)] if system else []
    parts += _history(record.get("history"), found)
    parts.append(Part("user", f"{instruction}\n\n{extra}" if extra else instruction, False))
    if answered and "output" not in record:
        answer = next((name for name in ("response", "answer", "completion") if name in record), "...")
        columns = {
            "instruction": "instruction",
            **({"input": "context"} if "context" in record else {}),
            "output": answer,
        }
        found.add(
            "missing_field",
            f"output is missing; there are {names(record)}.",
            f"Give it, or name the fields you have, such as {paste(columns)}.",
        )
    elif answered:
        parts.append(Part("assistant", found.answer(record, "output"), True))
    return found.problems or Example(tuple(parts), source, "alpaca")


def _history(history: Any, found: RowProblems) -> list[Part]:
    if not history:
        return []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        found.add("wrong_type", "history is not a list of [question, answer].", "Write it so.")
        return []
    pairs = [zip(("user", "assistant"), pair, strict=True) for pair in history]
    return parts_of([{"role": role, "content": text} for pair in pairs for role, text in pair], found, place="history")


def parse_pair(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: the completion is trained; in messages, its answers are."""
    found = RowProblems(source)
    prompt, completion = record.get("prompt"), record.get("completion")
    tools = tools_of(record, found)
    if not answered:
        return prompt_alone(prompt, tools, found, "prompt_completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        before = parts_of(prompt, found, place="prompt", trained=False)
        answers = parts_of(completion, found, place="completion")
        check_order([*before, *answers], found, place="prompt and completion")
        return found.problems or Example((*before, *answers), source, "prompt_completion", tools)
    if isinstance(prompt, list) != isinstance(completion, list) and None not in (prompt, completion):
        message = f"prompt is {describe_type(prompt)}, but completion is {describe_type(completion)}."
        found.add("wrong_type", message, "Both are text, or both are lists of messages.")
        return found.problems
    parts = (
        Part("user", found.text(record, "prompt"), False),
        Part("assistant", found.answer(record, "completion"), True),
    )
    return found.problems or Example(parts, source, "prompt_completion", tools, plain=True)


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


MESSAGES = Format("messages", parse_chat, ("messages", "tools", "functions"), ("messages",), ("messages",))
SHAREGPT = Format(
    "sharegpt",
    partial(parse_chat, key="conversations"),
    ("conversations", "system", "tools"),
    ("conversations",),
    ("conversations",),
)
ALPACA = Format(
    "alpaca",
    _parse_alpaca,
    ("instruction", "input", "output", "system", "history"),
    ("instruction", "output"),
    ("instruction",),
    matches=lambda record: "instruction" in record,
)
PROMPT_COMPLETION = Format(
    "prompt_completion",
    parse_pair,
    ("prompt", "completion", "tools"),
    ("prompt", "completion"),
    ("prompt",),
    matches=lambda record: "completion" in record or ("prompt" in record and record.keys().isdisjoint(_PREFERRED)),
)
