"""Rows that are graded: a prompt, perhaps a reference, and whatever else the grader reads of them.

{"prompt": "..." or [messages], "reference": "...", ...}
{"messages": [..., {"role": "user", "content": "..."}], "answer": "...", ...}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.formats.prompts import PROMPT_NAMES, prompt_field, prompt_in
from tunesmith.data.problems import SKIP, SKIPPING, RowProblems, unusable
from tunesmith.data.read import read
from tunesmith.errors import DataError
from tunesmith.graders.grade import Answer
from tunesmith.recipe.schema import Data
from tunesmith.types import Part, Problem, Record, Source

REFERENCES = ("reference", "reference_answer", "answer", "completion")
"""Fields with the right answer, the first that a row has; else it is the assistant's last turn."""
OTHER_REFERENCES = ("gold", "expected", "expected_answer", "expected_output", "ground_truth", "solution", "target")
"""Their usual names elsewhere, which are looked for last."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row: the prompt that a model gets, and all fields of the row, which the grader reads."""

    source: str
    item: Record
    messages: tuple[Record, ...]
    tools: tuple[Record, ...] = ()
    reference: Answer | None = None

    @property
    def text(self) -> str:
        """The last message before the answer."""
        return str(self.messages[-1]["content"])


def read_prompts(data: Data) -> tuple[list[Prompt], int]:
    """The rows of data.train, and the number of those that are left out (data.bad_rows: skip).

    Raises DataError with the problems of rows, by line.
    """
    problems: list[Problem] = []
    prompts: list[Prompt] = []
    bad: set[Source] = set()

    def note(problem: Problem) -> None:
        if problem.severity == "error":
            problems.append(problem)
            bad.add(problem.source)

    for _, record, source in read(data.train, limits=data.limits, on_problem=note, how=data.reading):
        prompt = prompt_of(record, source)
        if isinstance(prompt, Prompt):
            prompts.append(prompt)
        else:
            for problem in prompt:
                note(problem)
    if not prompts:
        raise DataError(f"{unusable(len(problems))}. Correct the data: no row is left without them.", problems)
    if problems and data.bad_rows == "error":
        way = f"or leave such rows out: {SKIP}"
        raise DataError(f"{unusable(len(problems))}. Correct the data, {way}.", problems, ways=[SKIPPING])
    return prompts, len(bad)


def read_as(item: Record) -> list[str]:
    """Notes on fields of a row that are read by names that are not ours."""
    prompt = prompt_field(item)
    notes = [f"the prompt is read from {prompt!r}"] if prompt in PROMPT_NAMES else []
    if all(item.get(name) is None for name in REFERENCES):
        right = (name for name in OTHER_REFERENCES if item.get(name) is not None)
        notes += [f"the right answer is read from {name!r}" for name in right][:1]
    return notes


def prompt_of(record: Record, source: Source) -> Prompt | list[Problem]:
    """The prompt of a row, or the problems that the row has."""
    row = RowProblems(source)
    prompt, answer, tools = prompt_in(record, row)
    if row.problems:
        return row.problems
    messages = tuple({"role": part.role, "content": part.text, **part.fields} for part in prompt)
    return Prompt(str(source), dict(record), messages, tools, reference_of(record, answer))


def reference_of(record: Record, turns: Sequence[Part] = ()) -> Answer | None:
    """The right answer that a row names, or that its last turns give."""
    for name in (*REFERENCES, *OTHER_REFERENCES):
        value = record.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping) and "content" in value[-1]:
            value = value[-1]["content"]
        if value is not None:
            is_text = isinstance(value, str)
            return Answer(value if is_text else json.dumps(value, ensure_ascii=False, default=str))
    if not turns:
        return None
    return Answer("".join(part.text for part in turns), tuple(turns[-1].fields.get("tool_calls", ())))
