"""An answer as a grader gets it, and its grade: a reward, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.types import JsonObject, Record

Kind = Literal[
    "exception", "timeout", "memory", "died", "not_a_number", "unknown_variable", "not_json", "formula",
    "no_code", "unreachable", "refused", "unreadable",
]  # fmt: skip
"""Why there is no reward."""
FAILURES: Mapping[str, str] = {
    "exception": "the grader raised an error",
    "timeout": "it took too long",
    "memory": "it took too much memory",
    "died": "its process ended by itself",
    "not_a_number": "it gave no finite number",
    "unknown_variable": "the row lacks a field that it names",
    "formula": "its formula has no value there",
    "no_code": "the row has no tests",
    "unreachable": "the judge could not be reached",
    "refused": "the judge refused to answer",
    "unreadable": "the judge's answer could not be read",
}


class GradeError(Exception):
    """A grade that failed: there is no reward, which differs from a reward of 0. Kind "not_json": the answer is
    at fault, not the grader."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to be graded: a sample of a model, or a text that plays one."""

    text: str
    tools: Sequence[Record] = ()
    """Tool calls in OpenAI's shape."""
    ended: bool = True
    """False: it was cut, since it reached the largest number of tokens."""
    tokens: int | None = None
    prefix: str = ""
    """The beginning of the answer that the chat template writes into the prompt, such as "<think>\\n"."""

    def as_sample(self) -> JsonObject:
        """`sample` as a grader gets it: OpenAI's names, and ours `ended`, `tokens` and `prefix`."""
        message = {"role": "assistant", "content": self.text, "tool_calls": list(self.tools)}
        reason = "tool_calls" if self.tools else "stop" if self.ended else "length"
        return {
            "output_text": self.text,
            "output_json": _json_of(self.text),
            "output_tools": list(self.tools),
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "ended": self.ended,
            "tokens": self.tokens,
            "prefix": self.prefix,
        }


def _json_of(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda word: None)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of an answer; `reward` None: the grade failed, as `kind` and `error` say."""

    reward: float | None
    scores: Mapping[str, float] = field(default_factory=dict)
    """Further numbers: one for each part of a multi grader, and those that a function returns by name."""
    kind: Kind | None = None
    error: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Further numbers that are none, as the grader gave them, by name: they are no scores."""
    is_unread: bool = False
    """True: the grader reads JSON and the answer has none, so that part gave its lowest reward."""
    seconds: float = 0.0
