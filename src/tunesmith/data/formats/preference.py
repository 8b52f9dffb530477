"""Preferences: {"prompt": "...", "chosen": "...", "rejected": "..."}, each text or a list of messages.

Read as well: chosen and rejected as whole conversations or transcripts, whose common beginning is the prompt (TRL's
implicit prompt, UltraFeedback, Anthropic's HH); OpenAI's input, preferred_output and non_preferred_output;
LLaMA-Factory's conversations with chosen and rejected turns; messages with rejected_response (ms-swift).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
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
_OPENAI = {"preferred_output", "non_preferred_output"}
_NAMES = {*SIDES, *_OPENAI, "rejected_response"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def matches(record: dict[str, Any]) -> bool:
    return not _NAMES.isdisjoint(record) and "completion" not in record


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and as branches the preferred and the other answer, both trained.

    Not `answered`: the prompt alone.
    """
    found, given = RowProblems(source), record.get("input")
    tools = tools_of(given if "tools" not in record and isinstance(given, dict) else record, found)
    if not answered:
        return prompt_alone(record.get("prompt"), tools, found, NAME)
    margin = record.get("margin")
    (margin,) = found.numbers(0.0 if margin in (None, "") else margin, 1, "margin")
    if margin < 0:
        found.add("bad_numbers", f"margin is {margin:g}.", "Give a number from 0 up, or leave it out.")
    parts, branches = (_texts if (plain := _is_plain(record)) else _turns)(record, found)
    if not found.problems:
        _check(parts, branches, found)
    scores = [record.get(f"score_{key}") for key in SIDES]
    if None not in scores and scores[0] == scores[1]:
        found.add("tie", f"score_chosen and score_rejected are both {scores[0]}: neither is better.", "Remove the row.")
    sides = tuple(map(tuple, branches))
    return found.problems or Example(tuple(parts), source, NAME, tools, plain=plain, branches=sides, values=(margin,))


def _is_plain(record: dict[str, Any]) -> bool:
    """Whether prompt and answers are texts, and no transcript."""
    prompt, sides = record.get("prompt"), [record.get(key) for key in SIDES]
    if "conversations" in record or isinstance(prompt, list) or not all(isinstance(side, str) for side in sides):
        return False
    return prompt is not None or not all(_TURN.match(str(side)) for side in sides)


def _texts(record: dict[str, Any], found: RowProblems) -> tuple[list[Part], list[list[Part]]]:
    """A prompt and two answers as text, or two texts that begin with their prompt."""
    sides = [found.answer(record, key) for key in SIDES]
    if record.get("prompt") is None:  # a space before the first difference belongs to the answers
        prompt = sides[0][: _common(*sides)].removesuffix(" ")
        sides = [side[len(prompt) :] for side in sides]
    else:
        prompt = found.text(record, "prompt")
    return [Part("user", prompt, False)], [[Part("assistant", side, True)] for side in sides]


def _turns(record: dict[str, Any], found: RowProblems) -> tuple[list[Part], list[list[Part]]]:
    """The prompt and both answers as messages."""
    keys, place, prompt = SIDES, "prompt", record.get("prompt")
    if not _OPENAI.isdisjoint(record):
        given = record.get("input")
        keys, place = ("preferred_output", "non_preferred_output"), "input.messages"
        prompt = given.get("messages", []) if isinstance(given, dict) else []
    sides = [record.get(key) for key in keys]
    if "rejected_response" in record:
        whole = parts_of(record.get("messages"), found)
        before = without_answer(whole, found)
        return _untrained(before), [whole[len(before) :], _answer(record, "rejected_response", found)]
    if "conversations" in record:
        system = found.optional_text(record, "system")
        first = [{"role": "system", "content": system}] if system else []
        prompt, place = [*first, *as_messages(record["conversations"], found)], "conversations"
        record = {key: as_messages([side], found, place=key) for key, side in zip(keys, sides, strict=True)}
    elif prompt is None and all(isinstance(side, str) for side in sides):
        record = {key: _transcript(str(side)) for key, side in zip(keys, sides, strict=True)}
    answers = [_answer(record, key, found) for key in keys]
    if found.problems:
        return [], answers
    if prompt is None or all(side[:1] and side[0].role in ("user", "system") for side in answers):
        num = _common(*([*map(_of, side)] for side in answers))
        return _untrained(answers[0][:num]), [side[num:] for side in answers]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return parts_of(turns, found, place=place, trained=False), answers


def _answer(record: dict[str, Any], key: str, found: RowProblems) -> list[Part]:
    """The turns of one side: a text, a message or a list of messages."""
    side = record.get(key)
    if side is None or isinstance(side, str):
        side = {"role": "assistant", "content": found.answer(record, key)}
    return parts_of([side] if isinstance(side, dict) else side, found, place=key)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of items that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _untrained(parts: Sequence[Part]) -> list[Part]:
    return [replace(part, trained=False) for part in parts]


def _of(part: Part) -> tuple[Any, ...]:
    return part.role, part.text, part.fields


def _check(prompt: Sequence[Part], branches: Sequence[Sequence[Part]], found: RowProblems) -> None:
    """Problems of sides that do not both answer the prompt, or teach nothing."""
    if [*map(_of, branches[0])] == [*map(_of, branches[1])]:
        found.add("identical_sides", "chosen and rejected are the same.", "Remove the row.")
        return
    for key, branch in zip(SIDES, branches, strict=True):
        if not branch:
            found.add("no_answer", f"{key} has no answer behind what both sides begin with.", "Write it.")
        elif branch[0].role != "assistant":
            message = f"the first turn that chosen and rejected do not share is of the {branch[0].role}."
            fix = "Both sides answer one prompt: correct it, or remove the row."
            found.add("prompt_differs", f"the prompts differ: {message}", fix)
            return
    if all(part.role in ("system", "developer") for part in prompt) and not found.problems:
        found.add("no_question", "it has no prompt that could be answered.", "Add the user's message.")
    for key, branch in zip(SIDES, branches, strict=True) if not found.problems else ():
        check_order([*prompt, *branch], found, place=f"prompt and {key}")
        if branch[-1].role != "assistant":
            found.add("no_answer", f"{key} ends with a message of the {branch[-1].role}.", "End it with an answer.")


def differ_in_space_alone(example: Example) -> bool:
    """Whether the sides of a preference are the same but for white space."""
    a, b = ([(part.role, "".join(part.text.split()), part.fields) for part in branch] for branch in example.branches)
    return a == b


def _transcript(text: str) -> list[dict[str, str]]:
    """The turns of a transcript with lines "Human:" and "Assistant:", as Anthropic's HH has them."""
    pieces = _TURN.split(text)[1:]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": said.strip()} for speaker, said in pairs]
