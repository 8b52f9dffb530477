"""Answers to one prompt, the best first, or with a score each: {"prompt": "...", "answers": ["...", "..."],
"scores": [4, 1]}. The prompt is text or a list of messages.

UltraFeedback's own rows are read as well: an instruction, and completions with a response and a fine-grained_score.
A row to be scored has one answer: {"prompt": "...", "completion": "..."}, each text, or each a list of messages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.data.formats import prompt_completion
from tunesmith.data.formats._turns import tools_of
from tunesmith.data.problems import RowProblems
from tunesmith.types import Example, Part, Problem, Shape, Source

NAME: Shape = "scored_answers"
FIELDS = ("prompt", "answers", "scores", "completion", "tools", "instruction", "completions")
REQUIRED = ("prompt", "answers")
INPUTS = ("prompt", "completion")
_RATED = {"answers": "response", "scores": "fine-grained_score"}
"""Fields of UltraFeedback's completions. The mean of four ratings is taken: its overall_score has 10 for some of 1."""


def matches(record: dict[str, Any]) -> bool:
    asked, given = ("instruction", "completions") if "completions" in record else ("prompt", "answers")
    return asked in record and isinstance(record.get(given), list)


def parse(record: dict[str, Any], source: Source, *, answered: bool = True) -> Example | list[Problem]:
    """The example of one row: its prompt, and a branch for each answer, the best first, with the scores as labels.

    Answers without scores are in order, and each counts those that follow.
    """
    if not answered:
        return prompt_completion.parse(record, source)
    found = RowProblems(source)
    if isinstance(record.get("completions"), list):
        rated = [one if isinstance(one, dict) else {} for one in record["completions"]]
        columns = {ours: [one.get(theirs) for one in rated] for ours, theirs in _RATED.items()}
        record = {"prompt": record.get("instruction"), **columns}
    answers = record.get("answers")
    if not isinstance(answers, list):
        found.wrong_type("answers", answers, "a list of texts")
        return found.problems
    example = prompt_completion.prompt_alone(record.get("prompt"), tools_of(record, found), found, NAME)
    num, given = len(answers), record.get("scores")
    scores = [float(num - 1 - i) for i in range(num)] if given is None else found.numbers(given, num, "scores")
    texts = found.answers(answers, "answers")
    if len(answers) < 2:
        found.add("no_preference", "it has fewer than two answers to compare.", "Give it more, or remove the row.")
    elif len(set(scores)) == 1 and not found.problems:
        found.add("tie", f"all its answers have score {scores[0]:g}: none is better.", "Remove the row.")
    if found.problems or not isinstance(example, Example):
        return found.problems
    order = sorted(range(len(texts)), key=lambda i: -scores[i])
    branches = tuple((Part("assistant", texts[i], True),) for i in order)
    labels = tuple(repr(scores[i]) for i in order)
    return replace(example, labels=labels, branches=branches, values=(0.0,))
