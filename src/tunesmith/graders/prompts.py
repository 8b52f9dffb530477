"""Rows that are graded: a prompt, perhaps a reference, and whatever else the grader reads of them.

{"prompt": "..." or [messages], "reference": "...", ...}
{"messages": [..., {"role": "user", "content": "..."}], "answer": "...", ...}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tunesmith.data.formats.prompts import prompt_in
from tunesmith.data.problems import RowProblems
from tunesmith.data.read import read
from tunesmith.errors import DataError
from tunesmith.graders.grade import Answer
from tunesmith.recipe.schema import DataFile, Limits
from tunesmith.types import Part, Problem, Record, Source

REFERENCES = ("reference", "reference_answer", "answer", "completion")
"""Fields with the right answer, the first that a row has; else it is the assistant's last turn."""
MOST_ROW_PROBLEMS = 20


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


def read_prompts(paths: Iterable[str]) -> list[Prompt]:
    """The rows of data files. Raises DataError with all problems, by line."""
    problems: list[Problem] = []
    prompts: list[Prompt] = []

    def note(problem: Problem) -> None:
        if problem.severity == "error":
            problems.append(problem)

    for _, record, source in read([DataFile(path=path) for path in paths], limits=Limits(), on_problem=note):
        prompt = prompt_of(record, source)
        if isinstance(prompt, Prompt):
            prompts.append(prompt)
        else:
            problems += prompt
    if problems:
        left = len(problems) - MOST_ROW_PROBLEMS
        more = [f"and {left:,} more problems"] if left > 0 else []
        raise DataError("\n".join([*map(str, problems[:MOST_ROW_PROBLEMS]), *more]), problems)
    return prompts


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
    for name in REFERENCES:
        value = record.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping) and "content" in value[-1]:
            value = value[-1]["content"]
        if value is not None:
            is_text = isinstance(value, str)
            return Answer(value if is_text else json.dumps(value, ensure_ascii=False, default=str))
    if not turns:
        return None
    return Answer("".join(part.text for part in turns), tuple(turns[-1].fields.get("tool_calls", ())))
