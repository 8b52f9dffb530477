"""Rows in, lines out: one for each, in their order, in memory bounded by a chunk of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import InputError
from tunesmith.tasks import TASKS
from tunesmith.types import Example, Problem, Source

Line = dict[str, Any]
Answered = Line | Problem
Answers = Callable[[Sequence[Example], Callable[[int], None], Callable[[Problem], None]], Sequence[Answered]]
"""What a model answers to examples, or why it cannot; it tells how many are done as it goes, and what was cut."""

CHUNK_CHARS = 4_000_000
"""A chunk is answered at once: it ends at this many characters, or at the rows that its maker says."""
MOST_SAID = 20
"""Warnings of one kind that are listed; all are counted."""


@dataclass
class Tally:
    """What became of the rows."""

    answered: int = 0
    errors: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    """By code."""
    first: dict[str, Problem] = field(default_factory=dict)
    """The first problem of each code, errors too."""

    def notes(self) -> list[str]:
        """A line for each kind of warning: the first in its own words, and how many there are."""
        return [
            f"{self.first[code]}" + (f" ({num:,} in all)" if num > 1 else "")
            for code, num in sorted(self.warnings.items())
        ]


class Lines:
    """Takes examples and problems as they are read, and hands on lines in the same order, a chunk at a time.

    `skip`: lines that an earlier call wrote. Their rows are read again, but not answered; `last_skipped` is the source
    of the last one, for the caller to compare.
    """

    def __init__(
        self,
        answers: Answers,
        write: Callable[[Sequence[Line]], None],
        *,
        chunk_rows: int,
        bare: bool = False,
        skip: int = 0,
        tick: Callable[[int, int], None] = lambda rows, within: None,
    ) -> None:
        self.tally = Tally()
        self.last_skipped: Source | None = None
        self._answers = answers
        self._write = write
        self._chunk_rows = chunk_rows
        self._bare = bare
        self._skip = skip
        self._tick = tick
        self._chunk: list[Example | Problem] = []
        self._num_chars = 0
        self._last: Source | None = None
        """Of the newest row: all problems of one row come one after the other."""

    def take(self, example: Example) -> None:
        """A row that can be answered."""
        self._add(example, sum(len(part.text) for part in example.parts))

    def hear(self, problem: Problem) -> None:
        """A row that cannot, or something to know about one that can."""
        if problem.severity == "warning":
            self.warn(problem)
        elif problem.source != self._last:
            self._add(problem, 0)

    def warn(self, problem: Problem) -> None:
        """Count a warning."""
        self.tally.warnings[problem.code] += 1
        self.tally.first.setdefault(problem.code, problem)

    def flush(self) -> None:
        """Answer and hand on what was taken so far."""
        if not self._chunk:
            return
        asked = [item for item in self._chunk if isinstance(item, Example)]
        tick = self._tick
        answers = iter(self._answers(asked, lambda done: tick(done, len(self._chunk)), self.warn) if asked else ())
        lines = [self._line(item, next(answers) if isinstance(item, Example) else item) for item in self._chunk]
        self._write(lines)
        self._chunk, self._num_chars = [], 0

    def _add(self, item: Example | Problem, num_chars: int) -> None:
        self._last = item.source
        if self._skip:
            self._skip -= 1
            self.last_skipped = item.source
            return
        if len(self._chunk) >= self._chunk_rows or self._num_chars >= CHUNK_CHARS:
            self.flush()
        self._chunk.append(item)
        self._num_chars += num_chars

    def _line(self, item: Example | Problem, answer: Line | Problem) -> Line:
        if isinstance(answer, Problem):
            self.tally.errors += 1
            self.tally.first.setdefault(answer.code, answer)
            told = f"{answer.code}: {answer.message} {answer.fix}".strip()
            kept = item.kept if isinstance(item, Example) else {}
            return {"source": str(answer.source), **kept, "error": told}
        assert isinstance(item, Example)
        self.tally.answered += 1
        line = answer if self._bare else as_row(item, answer)
        if taken := item.kept.keys() & {*line, "source", "error"}:
            raise InputError(
                f"--keep {min(taken)}: each line has a field of this name already. The row's own answer is kept as "
                "reference in any case; rename any other column."
            )
        return {"source": str(item.source), **_first(item.kept), **line, **_last(item.kept)}


def _first(kept: Mapping[str, Any]) -> Line:
    return {name: value for name, value in kept.items() if name != "reference"}


def _last(kept: Mapping[str, Any]) -> Line:
    """The reference, beside the answer."""
    return {name: value for name, value in kept.items() if name == "reference"}


def as_row(example: Example, answer: Line) -> Line:
    """The input of a row and what was answered, as a row that can be trained on."""
    line = {**fields_of(example), **answer}
    if "messages" in line and "answer" in line:
        line["messages"] = [*line["messages"], {"role": "assistant", "content": line.pop("answer")}]
    return line


def fields_of(example: Example) -> dict[str, Any]:
    """The input of a row under the names that its shape gives it, so that it can be read as a row again."""
    texts = [part.text for part in example.parts]
    if example.shape == "tokens_tags":
        return {"tokens": texts}
    if example.shape == "text":
        return {"text": texts[0]}
    if example.shape == "text_label":
        return dict(zip(("text", "text_pair"), texts, strict=False))
    if example.shape == "document_summary":
        return {"document": texts[0]}
    if example.plain:
        return {"prompt": texts[0]}
    messages = [{"role": part.role, "content": part.text, **part.fields} for part in example.parts]
    return {"messages": messages, **({"tools": list(example.tools)} if example.tools else {})}


def record_of(task: str, text: str, pair: str | None = None) -> Mapping[str, Any]:
    """A text as a row of the task."""
    return {**TASKS[task].record(text), **({} if pair is None else {"text_pair": pair})}
