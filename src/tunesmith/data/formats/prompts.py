"""Prompts whose answers are graded: the question, perhaps tools, and whatever else the grader reads of the row.

{"prompt": "..." or [messages], "reference": "...", ...}
{"messages": [..., {"role": "user", "content": "..."}], "answer": "...", ...}
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.formats.format import Format
from tunesmith.data.formats.turns import check_order, parts_of, tools_of, without_answer
from tunesmith.data.problems import RowProblems, names
from tunesmith.types import Example, JsonObject, Part, Problem, Record, Source

PROMPT_NAMES = ("question", "query", "problem", "instruction", "input")
"""Usual names of the prompt; where a row has two of them, nobody knows which the model answers."""


def prompt_field(record: Record) -> str | None:
    """The field with the prompt: prompt, messages, or the only one that a row has of the usual other names."""
    named = [name for name in ("prompt", "messages") if record.get(name) is not None]
    other = [name for name in PROMPT_NAMES if record.get(name) is not None]
    return named[0] if named else other[0] if len(other) == 1 else None


def prompt_in(record: Record, row: RowProblems) -> tuple[list[Part], Sequence[Part], tuple[Record, ...]]:
    """The turns that a model answers, the answer that follows them, if any, and the tools."""
    place = prompt_field(record)
    if place is None:
        fix = 'Rename its field to prompt, or write {"messages": [...]}, whose last message the model answers.'
        there = f"there are {names(record)}" if record else "the row is empty"
        row.add("missing_field", f"it has neither prompt nor messages; {there}.", fix)
        return [], (), ()
    content = record[place]
    turns = [{"role": "user", "content": content}] if isinstance(content, str) else content
    parts = parts_of(turns, row, place=place, trained=False)
    tools = tools_of(record, row)
    prompt = without_answer(parts, row)
    check_order(prompt, row, place=place, answered=False)
    if isinstance(content, str) and not content.strip():
        row.add("empty_prompt", f"{place} is empty.", "Write it, or remove the row.")
    return prompt, parts[len(prompt) :], tools


def _parse(record: JsonObject, source: Source, *, answered: bool = True) -> Example | list[Problem]:
    row = RowProblems(source)
    prompt, _, tools = prompt_in(record, row)
    return row.problems or Example(tuple(prompt), source, "prompts", tools, kept=dict(record))


PROMPTS = Format(
    name="prompts",
    parse=_parse,
    fields=("prompt", "messages", "tools", "functions"),
    required=(),
    inputs=(),
    matches=lambda record: True,
)
