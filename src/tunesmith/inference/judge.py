"""Judges of two answers to one prompt: models that give rewards, or that write which answer is better."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tunesmith.errors import DataError, InputError
from tunesmith.evaluation.bootstrap import Interval
from tunesmith.evaluation.win_rates import win_rates
from tunesmith.formatting import plural
from tunesmith.inference.load import LoadedModel
from tunesmith.inference.predict import Predictor
from tunesmith.types import Example, Part, Problem

QUESTION = (
    "Here are a request and two answers to it.\n\n{request}\n\nAnswer A:\n{a}\n\nAnswer B:\n{b}\n\n"
    "Which answer is better? Reply with A or B alone."
)


def judged(
    judge: LoadedModel, prompts: Sequence[Example], before: Sequence[str], after: Sequence[str]
) -> tuple[dict[str, Interval], str]:
    """Win rates of the answers after against those before, and a note. A judge that writes sees both orders; if
    it contradicts itself, or says neither, that is a tie. Raises InputError for a judge that can do neither."""
    if judge.labels is not None and judge.labels.kind == "number":
        sides: list[Sequence[float]] = [_rewards(judge, prompts, answers) for answers in (before, after)]
    elif judge.head == "next_token":
        sides = [_choices(judge, prompts, *answers) for answers in ((after, before), (before, after))]
    else:
        raise InputError(f"--judge: {judge.located.name} neither gives rewards nor writes. Use a run of task reward.")
    longer_I = [len(new.split()) - len(old.split()) for old, new in zip(before, after, strict=True)]
    won = (1 + np.sign(np.subtract(sides[1], sides[0]))) / 2
    note = f"{plural(len(won), 'prompt')} judged by {judge.run.path if judge.run else judge.located.name}"
    return win_rates(won, np.array(longer_I, np.float64)), f"{note}; {plural(int((won == 0.5).sum()), 'tie')}"


def _rewards(judge: LoadedModel, prompts: Sequence[Example], answers: Sequence[str]) -> list[float]:
    given = [Part("assistant", answer or " ", True) for answer in answers]  # templates refuse an empty one
    rows = [replace(example, parts=(*example.parts, part)) for example, part in zip(prompts, given, strict=True)]
    return list(map(float, _values(judge, rows)))


def _choices(judge: LoadedModel, prompts: Sequence[Example], first: Sequence[str], second: Sequence[str]) -> list[int]:
    """1 where the second answer is chosen, -1 where the first is, else 0."""
    rows = []
    for example, a, b in zip(prompts, first, second, strict=True):
        request = "\n\n".join(f"{part.role}: {part.text}" for part in example.parts)
        parts = (Part("user", QUESTION.format(request=request, a=a, b=b), False),)
        rows.append(replace(example, parts=parts, tools=()))
    return [{"A": -1, "B": 1}.get(str(said).strip()[:1].upper(), 0) for said in _values(judge, rows)]


def _values(judge: LoadedModel, rows: Sequence[Example]) -> Iterator[Any]:
    """The judge's answer to each row. Raises DataError for a row that it cannot read."""
    for line in Predictor(judge, max_new_tokens=4)(rows, lambda done: None, lambda warning: None):
        if isinstance(line, Problem):
            raise DataError(f"--judge: {line}", [line])
        yield next(iter(line.values()))
