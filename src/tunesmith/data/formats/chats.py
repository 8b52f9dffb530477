"""Conversations: messages as OpenAI writes them, conversations as ShareGPT does, Alpaca's tasks, plain pairs.

{"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
{"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
{"instruction": "...", "input": "...", "output": "..."}, perhaps with system and history
{"prompt": "...", "completion": "..."}, both text, or both lists of messages
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import orjson

from tunesmith.data.formats import row_images
from tunesmith.data.formats.format import Format
from tunesmith.data.formats.row_images import RowImages
from tunesmith.data.formats.turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.problems import RowProblems, describe_type, names, paste
from tunesmith.phrases import nearest
from tunesmith.types import Example, JsonObject, Part, Problem, Record, Shape, Source

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
    record: JsonObject,
    source: Source,
    *,
    answered: bool = True,
    key: Literal["messages", "conversations"] = "messages",
) -> Example | list[Problem]:
    """The example of one row; answers of weight other than 0 are trained. Not `answered`: up to the last."""
    check = RowProblems(source)
    turns, system, place = record.get(key), "", key
    if turns is None:
        check.add("missing_field", f"{key} is missing or null.", "Remove the row.")
    elif key == "conversations" or (
        isinstance(turns, list) and any(isinstance(turn, dict) and "from" in turn for turn in turns)
    ):
        turns = as_messages(turns, check, key)
    if check.problems:
        return check.problems
    tools, images = tools_of(record, check), RowImages(record, check)
    parts = parts_of(turns, check, place=key, trained=answered, images=images)
    images.finish()
    if key == "conversations" and (system := check.optional_text(record, "system")):
        parts.insert(0, Part("system", system, False))
    if not answered:
        parts = without_answer(parts, check)
    check_order(parts, check, place=f"system and {place}" if system else place, answered=answered)
    return check.problems or Example(tuple(parts), source, "sharegpt" if key == "conversations" else key, tools)


def as_messages(turns: object, check: RowProblems, place: str = "conversations") -> list[JsonObject]:
    """ShareGPT's turns in the form of messages."""
    if isinstance(turns, list):
        return [_message(turn, check, f"{place}[{i}]") for i, turn in enumerate(turns)]
    if turns is None:
        check.add("missing_field", f"{place} is missing or null.", "Remove the row.")
    else:
        check.wrong_type(place, turns, "a list of messages")
    return []


def _message(turn: object, check: RowProblems, place: str) -> JsonObject:
    if not isinstance(turn, dict):
        check.wrong_type(place, turn, 'an object such as {"from": "human", "value": "Hi"}')
        return {}
    speaker, value = turn.get("from"), turn.get("value")
    if speaker is None and "role" in turn:  # as OpenAI writes it
        return turn
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if speaker is None:
        check.add("missing_field", f"{place}.from is missing.", f"One of {', '.join(SPEAKERS)}.")
    elif not isinstance(speaker, str):
        check.wrong_type(f"{place}.from", speaker, "text")
    elif speaker not in SPEAKERS:
        check.add("unknown_role", f"{place}.from is {speaker[:40]!r}.", f"One of {', '.join(SPEAKERS)}.")
    elif value is None:
        check.add("missing_field", f"{place}.value is missing or null.", "Write it, or remove the row.")
    elif not isinstance(value, str):
        check.wrong_type(f"{place}.value", value, "text")
    elif speaker == "function_call":
        return {**rest, "role": "assistant", "content": "", "tool_calls": _calls(value, check, place)}
    return {**rest, "role": SPEAKERS.get(str(speaker), ""), "content": value}


def _calls(value: str, check: RowProblems, place: str) -> list[JsonObject]:
    """The calls written as JSON in a function_call turn: one, or a list of them."""
    try:
        calls = orjson.loads(value)
    except orjson.JSONDecodeError as error:
        fix = 'Write {"name": ..., "arguments": {...}}.'
        check.add("bad_tool_call", f"{place}.value is a function call, but not JSON: {error.msg}.", fix)
        return []
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _parse_alpaca(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: instruction, a blank line and input are the user's message; output is trained.

    Answers in `history` are trained too.
    """
    check = RowProblems(source)
    instruction = check.text(record, "instruction")
    extra = check.optional_text(record, "input")
    system = check.optional_text(record, "system")
    parts = [Part("system", system, False)] if system else []
    parts += _history(record.get("history"), check)
    parts.append(_prompt(f"{instruction}\n\n{extra}" if extra else instruction, record, check))
    if answered and "output" not in record:
        answer = next((name for name in ("response", "answer", "completion") if name in record), "...")
        columns = {
            "instruction": "instruction",
            **({"input": "context"} if "context" in record else {}),
            "output": answer,
        }
        check.add(
            "missing_field",
            f"output is missing; there are {names(record)}.",
            f"Give it, or name the fields you have, such as {paste(columns)}.",
        )
    elif answered:
        parts.append(Part("assistant", check.answer(record, "output"), True))
    return check.problems or Example(tuple(parts), source, "alpaca")


def _prompt(text: str, record: Record, check: RowProblems) -> Part:
    """A prompt with the images of its row: where markers are, else in front of it."""
    images = RowImages(record, check)
    part = row_images.with_images(Part("user", text, False), images, "its prompt")
    if not part.images:
        part = replace(part, images=images.in_front())
    images.finish()
    return part


def _history(history: object, check: RowProblems) -> list[Part]:
    if not history:
        return []
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        check.add("wrong_type", "history is not a list of [question, answer].", "Write it so.")
        return []
    pairs = [zip(("user", "assistant"), pair, strict=True) for pair in history]
    return parts_of([{"role": role, "content": text} for pair in pairs for role, text in pair], check, place="history")


PROMPTS_ALONE = "Prompts without answers are for --task reinforce, with a --grader."


def parse_pair(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: the completion is trained; in messages, its answers are."""
    check = RowProblems(source)
    prompt, completion = record.get("prompt"), record.get("completion")
    tools = tools_of(record, check)
    if not answered:
        return prompt_alone(prompt, tools, check, "prompt_completion", record)
    if isinstance(prompt, list) and isinstance(completion, list):
        images = RowImages(record, check)
        before = parts_of(prompt, check, place="prompt", trained=False, images=images)
        answers = parts_of(completion, check, place="completion", images=images)
        images.finish()
        check_order([*before, *answers], check, place="prompt and completion")
        return check.problems or Example((*before, *answers), source, "prompt_completion", tools)
    if isinstance(prompt, list) != isinstance(completion, list) and None not in (prompt, completion):
        message = f"prompt is {describe_type(prompt)}, but completion is {describe_type(completion)}."
        check.add("wrong_type", message, "Both are text, or both are lists of messages.")
        return check.problems
    parts = (
        _prompt(check.text(record, "prompt"), record, check),
        Part("assistant", check.answer(record, "completion"), True),
    )
    if "prompt" in record and "completion" not in record and nearest("completion", record, 0.8) is None:
        check.problems[-1] = replace(check.problems[-1], fix=f"{check.problems[-1].fix} {PROMPTS_ALONE}")
    return check.problems or Example(parts, source, "prompt_completion", tools, plain=True)


def prompt_alone(
    prompt: Any, tools: tuple[Record, ...], check: RowProblems, shape: Shape, record: Record = MappingProxyType({})
) -> Example | list[Problem]:
    """The example of a prompt that waits for its answer. `record`: its row, where that may have images."""
    if isinstance(prompt, list):
        images = RowImages(record, check)
        before = parts_of(prompt, check, place="prompt", trained=False, images=images)
        images.finish()
        check_order(before, check, place="prompt", answered=False)
        return check.problems or Example(tuple(before), check.source, shape, tools)
    parts = (_prompt(check.text({"prompt": prompt}, "prompt"), record, check),)
    return check.problems or Example(parts, check.source, shape, tools, plain=True)


MESSAGES = Format(
    "messages",
    parse_chat,
    ("messages", "tools", "functions", *row_images.IMAGE_FIELDS),
    ("messages",),
    ("messages",),
)
SHAREGPT = Format(
    "sharegpt",
    partial(parse_chat, key="conversations"),
    ("conversations", "system", "tools", *row_images.IMAGE_FIELDS),
    ("conversations",),
    ("conversations",),
)
ALPACA = Format(
    "alpaca",
    _parse_alpaca,
    ("instruction", "input", "output", "system", "history", *row_images.IMAGE_FIELDS),
    ("instruction", "output"),
    ("instruction",),
    matches=lambda record: "instruction" in record,
)
PROMPT_COMPLETION = Format(
    "prompt_completion",
    parse_pair,
    ("prompt", "completion", "tools", *row_images.IMAGE_FIELDS),
    ("prompt", "completion"),
    ("prompt",),
    matches=lambda record: "completion" in record or ("prompt" in record and record.keys().isdisjoint(_PREFERRED)),
)
