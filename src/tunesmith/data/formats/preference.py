"""Preferences: {"prompt": "...", "chosen": "...", "rejected": "..."}, each text or a list of messages.

Read as well: chosen and rejected as whole conversations or transcripts, whose common beginning is the prompt (TRL's
implicit prompt, UltraFeedback, Anthropic's HH); OpenAI's input, preferred_output and non_preferred_output;
LLaMA-Factory's conversations with chosen and rejected turns; messages with rejected_response (ms-swift).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from tunesmith.data.formats._turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.formats.prompt_completion import prompt_alone
from tunesmith.data.formats.sharegpt import as_messages
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "preference"
SIDES = ("chosen", "rejected")
FIELDS = (
    "prompt", "chosen", "rejected", "margin", "tools", "score_chosen", "score_rejected", "input", "preferred_output",
    "non_preferred_output", "conversations", "system", "messages", "rejected_response",
)  # fmt: skip
REQUIRED = ("prompt", *SIDES)
INPUTS = ("prompt",)
_NAMES = {*SIDES, "preferred_output", "non_preferred_output", "rejected_response"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def matches(record: dict[str, Any]) -> bool:
    return not _NAMES.isdisjoint(record) and "completion" not in record


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and as branches the preferred and the other answer, both trained.

    Not `answered`: the prompt alone.
    """
    found = RowProblems(source)
    tools = tools_of(_tools_in(record), found)
    if not answered:
        return prompt_alone(record.get("prompt"), tools, found, NAME)
    margin = _margin(record, found)
    prompt, sides = _read(record, found)
    if found.problems:
        return found.problems
    plain = isinstance(prompt, str)
    branches: tuple[tuple[Part, ...], ...]
    if isinstance(prompt, str):
        parts: tuple[Part, ...] = (Part("user", prompt, False),)
        branches = tuple((Part("assistant", side, True),) for side in sides)
    else:
        _check_prompt(prompt, sides, found)
        if found.problems:
            return found.problems
        parts, branches = tuple(prompt), tuple(tuple(side[len(prompt) :]) for side in sides)
        _check_branches(parts, branches, found)
    _compare(record, branches, found)
    return found.problems or Example(parts, source, NAME, tools, plain=plain, branches=branches, values=(margin,))


def _tools_in(record: dict[str, Any]) -> dict[str, Any]:
    given = record.get("input")
    return given if "tools" not in record and isinstance(given, dict) else record


def _margin(record: dict[str, Any], found: RowProblems) -> float:
    """How much better the chosen answer is: 0 where the row does not say."""
    value = record.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        found.add("bad_margin", f"margin is {str(value)[:40]}.", "Give a number from 0 up, or leave it out.")
        return 0.0
    return float(value)


Conversations = tuple[str | list[Part], list[Any]]
"""A prompt as text with both answers as text, or as parts with both conversations as parts."""


def _read(record: dict[str, Any], found: RowProblems) -> Conversations:
    if "preferred_output" in record or "non_preferred_output" in record:
        given = record.get("input")
        messages = given.get("messages") if isinstance(given, dict) else None
        before = parts_of(messages, found, place="input.messages", trained=False)
        return before, [_behind(before, record, key, found) for key in ("preferred_output", "non_preferred_output")]
    if "rejected_response" in record:
        whole = parts_of(record.get("messages"), found)
        before = _untrained(without_answer(whole, found))
        return before, [[*before, *whole[len(before) :]], _behind(before, record, "rejected_response", found)]
    if "conversations" in record:
        system = found.optional_text(record, "system")
        first = [{"role": "system", "content": system}] if system else []
        turns = [*first, *as_messages(record["conversations"], found)]
        before = _untrained(parts_of(turns, found, place="conversations"))
        answers = {key: as_messages([record.get(key)], found, place=key) for key in SIDES}
        return before, [_behind(before, answers, key, found) for key in SIDES]
    if all(isinstance(record.get(key), str) for key in SIDES):
        return _texts(record, found)
    return _lists(record, found)


def _texts(record: dict[str, Any], found: RowProblems) -> Conversations:
    """Both sides are text, behind a prompt or beginning with it."""
    prompt, sides = record.get("prompt"), [found.answer(record, key) for key in SIDES]
    if isinstance(prompt, list):
        before = parts_of(prompt, found, place="prompt", trained=False)
        return before, [_behind(before, record, key, found) for key in SIDES]
    if prompt is not None:
        return found.text(record, "prompt"), sides
    if all(_TURN.match(side) for side in sides):
        wholes = [parts_of(_transcript(side), found, place=key) for side, key in zip(sides, SIDES, strict=True)]
        return _common(wholes, found), wholes
    start = _common_text(*sides)
    return sides[0][:start], [side[start:] for side in sides]


def _lists(record: dict[str, Any], found: RowProblems) -> Conversations:
    """Both sides are messages, behind a prompt or beginning with it."""
    for key in SIDES:
        if not isinstance(record.get(key), list | dict):
            found.text(record, key)
            if isinstance(record.get(key), str):
                found.add("wrong_type", f"{key} is text, the other side is not.", "Write both alike.")
    prompt = record.get("prompt")
    if found.problems:
        return "", []
    if prompt is None or _opens_itself([record[key] for key in SIDES]):
        wholes = [_behind([], record, key, found) for key in SIDES]
        return ([] if found.problems else _common(wholes, found)), wholes
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    before = parts_of(turns, found, place="prompt", trained=False)
    return before, [_behind(before, record, key, found) for key in SIDES]


def _opens_itself(sides: Sequence[Any]) -> bool:
    """Whether the lists hold the prompt too, as UltraFeedback's do."""
    firsts = [side[0] if isinstance(side, list) and side else None for side in sides]
    return all(isinstance(first, dict) and first.get("role") in ("user", "system") for first in firsts)


def _behind(before: Sequence[Part], record: dict[str, Any], key: str, found: RowProblems) -> list[Part]:
    """The prompt with the answer of one side: a text, a message or a list of messages."""
    side = record.get(key)
    if side is None:
        found.text(record, key)
        return [*before]
    if isinstance(side, str):
        side = [{"role": "assistant", "content": found.answer(record, key)}]
    return [*before, *parts_of([side] if isinstance(side, dict) else side, found, place=key)]


def _untrained(parts: Sequence[Part]) -> list[Part]:
    return [Part(part.role, part.text, False, part.fields) for part in parts]


def _common(wholes: Sequence[Sequence[Part]], found: RowProblems) -> list[Part]:
    """The turns that both conversations begin with."""
    num = 0
    for a, b in zip(*wholes, strict=False):
        if (a.role, a.text, a.fields) != (b.role, b.text, b.fields):
            break
        num += 1
    if num == len(wholes[0]) == len(wholes[1]):
        found.add("identical_sides", "chosen and rejected are the same.", "Remove the row.")
    return _untrained(wholes[0][:num])


def _check_prompt(prompt: Sequence[Part], sides: Sequence[Sequence[Part]], found: RowProblems) -> None:
    """Problems of sides that do not both answer the prompt."""
    for key, side in zip(SIDES, sides, strict=True):
        behind = side[len(prompt) :]
        if not behind:
            found.add("no_answer", f"{key} has no answer behind what both sides begin with.", "Write it.")
        elif behind[0].role != "assistant":
            found.add(
                "prompt_differs",
                f"the prompts differ: the first turn that chosen and rejected do not share is of the {behind[0].role}.",
                "Both sides answer one prompt: correct it, or remove the row.",
            )
            break
    if not any(part.role not in ("system", "developer") for part in prompt) and not found.problems:
        found.add("no_question", "it has no prompt that could be answered.", "Add the user's message.")


def _check_branches(prompt: Sequence[Part], branches: Sequence[Sequence[Part]], found: RowProblems) -> None:
    for key, branch in zip(SIDES, branches, strict=True):
        check_order([*prompt, *branch], found, place=f"prompt and {key}")
        if branch[-1].role != "assistant" and not found.problems:
            found.add("no_answer", f"{key} ends with a message of the {branch[-1].role}.", "End it with an answer.")


def _compare(record: dict[str, Any], branches: Sequence[Sequence[Part]], found: RowProblems) -> None:
    """Problems of two sides that teach nothing."""
    if found.problems:
        return
    a, b = ([(part.role, part.text, part.fields) for part in branch] for branch in branches)
    if a == b:
        found.add("identical_sides", "chosen and rejected are the same.", "Remove the row.")
        return
    scores = [record.get(f"score_{key}") for key in SIDES]
    if None not in scores and scores[0] == scores[1]:
        found.add("tie", f"score_chosen and score_rejected are both {scores[0]}: neither is better.", "Remove the row.")


def differ_in_space_alone(example: Example) -> bool:
    """Whether the sides of a preference are the same but for white space."""
    a, b = ([(part.role, "".join(part.text.split()), part.fields) for part in branch] for branch in example.branches)
    return a == b


def _transcript(text: str) -> list[dict[str, str]]:
    """The turns of a transcript with lines "Human:" and "Assistant:", as Anthropic's HH has them."""
    pieces = _TURN.split(text)[1:]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in pairs]


def _common_text(a: str, b: str) -> int:
    """Characters that both begin with; a space before the first difference belongs to the answers."""
    num = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return num - 1 if num and a[num - 1] == " " else num
