"""Answers to a prompt that are compared: pairs, answers that are wanted or not, and answers with scores.

    {"prompt": "...", "chosen": "...", "rejected": "..."}, each text or a list of messages
    {"prompt": "...", "completion": "...", "label": true}, or messages with a label
    {"prompt": "...", "answers": ["...", "..."], "scores": [4, 1]}, or the best first without scores

Pairs are read as well with chosen and rejected as whole conversations or transcripts, whose common beginning is
the prompt (TRL's implicit prompt, UltraFeedback, Anthropic's HH); as OpenAI's input, preferred_output and
non_preferred_output; and as LLaMA-Factory's conversations with chosen and rejected turns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunesmith.data.formats.chats import as_messages, parse_chat, parse_pair, prompt_alone
from tunesmith.data.formats.format import Format
from tunesmith.data.formats.turns import check_order, parts_of, tools_of
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, JsonObject, Part, Problem, Source

SIDES = ("chosen", "rejected")
_OPENAI = {"preferred_output", "non_preferred_output"}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def _parse_preference(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and as branches the preferred and the other answer, both trained.

    Not `answered`: the prompt alone.
    """
    check, openai_input = RowProblems(source), record.get("input")
    holds_tools = openai_input if isinstance(openai_input, dict) and "tools" not in record else record
    tools = tools_of(holds_tools, check)
    if not answered:
        return prompt_alone(record.get("prompt"), tools, check, "preference")
    margin = record.get("margin")
    (margin,) = check.numbers(0.0 if margin in (None, "") else margin, 1, "margin")
    if margin < 0:
        check.add("bad_numbers", f"margin is {margin:g}.", "Give a number from 0 up, or leave it out.")
    parts, branches = (_texts if (plain := _is_plain(record)) else _turns)(record, check)
    if not check.problems:
        _check(parts, branches, check)
    scores = [record.get(f"score_{key}") for key in SIDES]
    if None not in scores and scores[0] == scores[1]:
        check.add("tie", f"score_chosen and score_rejected are both {scores[0]}: neither is better.", "Remove the row.")
    sides = tuple(map(tuple, branches))
    return check.problems or Example(
        tuple(parts), source, "preference", tools, plain=plain, branches=sides, values=(margin,)
    )


def _is_plain(record: JsonObject) -> bool:
    """Whether prompt and answers are texts, and no transcript."""
    prompt, sides = record.get("prompt"), [record.get(key) for key in SIDES]
    if "conversations" in record or isinstance(prompt, list) or not all(isinstance(side, str) for side in sides):
        return False
    return prompt is not None or not all(_TURN.match(str(side)) for side in sides)


def _texts(record: JsonObject, check: RowProblems) -> tuple[list[Part], list[list[Part]]]:
    """A prompt and two answers as text, or two texts that begin with their prompt."""
    sides = [check.answer(record, key) for key in SIDES]
    if record.get("prompt") is None:  # a space before the first difference belongs to the answers
        prompt = sides[0][: _common(*sides)].removesuffix(" ")
        sides = [side[len(prompt) :] for side in sides]
    else:
        prompt = check.text(record, "prompt")
    return [Part("user", prompt, False)], [[Part("assistant", side, True)] for side in sides]


def _turns(record: JsonObject, check: RowProblems) -> tuple[list[Part], list[list[Part]]]:
    """The prompt and both answers as messages."""
    keys, place, prompt = SIDES, "prompt", record.get("prompt")
    if not _OPENAI.isdisjoint(record):
        openai_input = record.get("input")
        keys, place = ("preferred_output", "non_preferred_output"), "input.messages"
        prompt = openai_input.get("messages", []) if isinstance(openai_input, dict) else []
    sides = [record.get(key) for key in keys]
    if "conversations" in record:
        system = check.optional_text(record, "system")
        first = [{"role": "system", "content": system}] if system else []
        prompt, place = [*first, *as_messages(record["conversations"], check)], "conversations"
        record = {key: as_messages([side], check, place=key) for key, side in zip(keys, sides, strict=True)}
    elif prompt is None and all(isinstance(side, str) for side in sides):
        record = {key: _transcript(str(side)) for key, side in zip(keys, sides, strict=True)}
    answers = [_answer(record, key, check) for key in keys]
    if check.problems:
        return [], answers
    if prompt is None or all(side[:1] and side[0].role in ("user", "system") for side in answers):
        num = _common(*([*map(_of, side)] for side in answers))
        return _untrained(answers[0][:num]), [side[num:] for side in answers]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return parts_of(turns, check, place=place, trained=False), answers


def _answer(record: JsonObject, key: str, check: RowProblems) -> list[Part]:
    """The turns of one side: a text, a message or a list of messages."""
    side = record.get(key)
    if side is None or isinstance(side, str):
        side = {"role": "assistant", "content": check.answer(record, key)}
    return parts_of([side] if isinstance(side, dict) else side, check, place=key)


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of items with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _untrained(parts: Sequence[Part]) -> list[Part]:
    return [replace(part, trained=False) for part in parts]


def _of(part: Part) -> tuple[Any, ...]:
    return part.role, part.text, part.fields


def _check(prompt: Sequence[Part], branches: Sequence[Sequence[Part]], check: RowProblems) -> None:
    """Problems of sides that do not both answer the prompt, or teach nothing."""
    if [*map(_of, branches[0])] == [*map(_of, branches[1])]:
        check.add("identical_sides", "chosen and rejected are the same.", "Remove the row.")
        return
    for key, branch in zip(SIDES, branches, strict=True):
        if not branch:
            check.add("no_answer", f"{key} has no answer behind what both sides begin with.", "Write it.")
        elif branch[0].role != "assistant":
            message = f"the first turn that chosen and rejected do not share is of the {branch[0].role}."
            fix = "Both sides answer one prompt: correct it, or remove the row."
            check.add("prompt_differs", f"the prompts differ: {message}", fix)
            return
    if all(part.role in ("system", "developer") for part in prompt) and not check.problems:
        check.add("no_question", "it has no prompt that could be answered.", "Add the user's message.")
    for key, branch in zip(SIDES, branches, strict=True) if not check.problems else ():
        check_order([*prompt, *branch], check, place=f"prompt and {key}")
        if branch[-1].role != "assistant":
            check.add("no_answer", f"{key} ends with a message of the {branch[-1].role}.", "End it with an answer.")


def differ_in_space_alone(example: Example) -> bool:
    """Whether both sides of a preference are the same except for white space."""

    a, b = ([(part.role, "".join(part.text.split()), part.fields) for part in branch] for branch in example.branches)
    return a == b


def _transcript(text: str) -> list[dict[str, str]]:
    """The turns of a transcript with lines "Human:" and "Assistant:", as Anthropic's HH has them."""
    pieces = _TURN.split(text)[1:]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _SPEAKERS[speaker], "content": text.strip()} for speaker, text in pairs]


def _parse_unpaired(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and as its branch what is trained, with 1 if it is wanted, else 0."""
    label = record.get("label")
    if answered and not isinstance(label, bool):
        return [Problem(source, "bad_label", f"label is {str(label)[:40]}.", "true: the answer is wanted; or false.")]
    parsed = (parse_chat if "messages" in record else parse_pair)(record, source, answered=answered)
    if not answered or not isinstance(parsed, Example):
        return parsed
    first = next((i for i, part in enumerate(parsed.parts) if part.trained), len(parsed.parts))
    prompt, answer = parsed.parts[:first], parsed.parts[first:]
    branches = (answer,) if answer else ()
    return replace(parsed, parts=prompt, shape="unpaired", branches=branches, values=(float(bool(label)),))


def _parse_scored(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and a branch for each answer, best first, with scores as labels.

    Answers without scores are in order, and each counts those that follow.
    """
    if not answered:
        return parse_pair(record, source)
    check = RowProblems(source)
    answers = record.get("answers")
    if not isinstance(answers, list):
        check.wrong_type("answers", answers, "a list of texts")
        return check.problems
    example = prompt_alone(record.get("prompt"), tools_of(record, check), check, "scored_answers")
    num, given_scores = len(answers), record.get("scores")
    by_order = [float(num - 1 - i) for i in range(num)]
    scores = by_order if given_scores is None else check.numbers(given_scores, num, "scores")
    texts = check.answers(answers, "answers")
    if len(answers) < 2:
        check.add("no_preference", "it has fewer than two answers to compare.", "Give it more, or remove the row.")
    elif len(set(scores)) == 1 and not check.problems:
        check.add("tie", f"all its answers have score {scores[0]:g}: none is better.", "Remove the row.")
    if check.problems or not isinstance(example, Example):
        return check.problems
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    branches = tuple((Part("assistant", texts[i], True),) for i in order)
    labels = tuple(repr(scores[i]) for i in order)
    return replace(example, labels=labels, branches=branches, values=(0.0,))


PREFERENCE = Format(
    "preference",
    _parse_preference,
    ("prompt", *SIDES, "margin", "tools", "score_chosen", "score_rejected", "input", "preferred_output",
     "non_preferred_output", "conversations", "system"),
    ("prompt", *SIDES),
    ("prompt",),
    matches=lambda record: not {*SIDES, *_OPENAI}.isdisjoint(record) and "completion" not in record,
)  # fmt: skip
UNPAIRED = Format(
    "unpaired",
    _parse_unpaired,
    ("prompt", "completion", "label", "messages", "tools"),
    ("prompt", "completion", "label"),
    ("prompt",),
    matches=lambda record: isinstance(record.get("label"), bool) and ("completion" in record or "messages" in record),
)
SCORED_ANSWERS = Format(
    "scored_answers",
    _parse_scored,
    ("prompt", "answers", "scores", "completion", "tools"),
    ("prompt", "answers"),
    ("prompt", "completion"),
    matches=lambda record: "prompt" in record and isinstance(record.get("answers"), list),
)
