"""Rows to examples: fields renamed, the shape of a file found on its first good row and held to. See docs/data.md."""

# I rows

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from tunesmith.data.formats import FIELDS, FORMATS, find_shape
from tunesmith.data.opening import FileFacts, refusal
from tunesmith.data.read import read
from tunesmith.data.remarks import remarks
from tunesmith.errors import RecipeError
from tunesmith.recipe.knobs import Data, DataFile
from tunesmith.types import Example, Problem, Shape, Source

OnProblem = Callable[[Problem], None]

MOST_NAMES = 20
"""Ignored fields named in one line."""


def examples(
    files: Sequence[DataFile], data: Data, on_problem: OnProblem, *, facts: list[FileFacts] | None = None
) -> Iterator[tuple[int, Example]]:
    """Index of the file and example of every row that can be used; all problems of the others go to `on_problem`.

    `facts` is filled with what is known of each file, as by `read`.

    Raises:
        RecipeError: data.columns names a field that no shape has.
        DataError: a file cannot be read, see `read`; or the columns of a table are those of no shape.
    """
    check_columns(data.columns)
    known: list[FileFacts] = [] if facts is None else facts
    of_file: _FileExamples | None = None
    first = len(known)
    index = -1
    for i, record, source in read(files, limits=data.limits, on_problem=on_problem, facts=known):
        if of_file is None or i != index:
            if of_file is not None:
                of_file.finish()
            index, of_file = i, _FileExamples(known[first + i], data, on_problem)
        example = of_file.example(record, source)
        if example is not None:
            yield i, example
    if of_file is not None:
        of_file.finish()


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise `RecipeError` when data.columns names a field that no shape has, or one of the data's twice."""
    for ours, theirs in columns.items():
        if ours not in FIELDS:
            near = difflib.get_close_matches(ours, FIELDS, n=1)
            swapped = f"did you mean {{{theirs}: {ours}}}?" if theirs in FIELDS else f"one of {', '.join(FIELDS)}."
            hint = f"did you mean {near[0]}?" if near else swapped
            raise RecipeError(f"data.columns.{ours}: no shape has such a field, {hint}")
    twice = sorted({theirs for theirs in columns.values() if list(columns.values()).count(theirs) > 1})
    if twice:
        raise RecipeError(f"data.columns: {twice[0]} stands for two fields; a column can be one.")


@dataclass
class _FileExamples:
    """The rows of one file on their way to examples."""

    facts: FileFacts
    data: Data
    on_problem: OnProblem
    shape: Shape | None = None
    ignored: dict[str, Source] = field(default_factory=dict)
    """Fields that no one reads, and where each stood first."""
    is_mapped: bool = False

    def example(self, record: dict[str, Any], source: Source) -> Example | None:
        if self.data.columns:
            renamed = self._renamed(record, source)
            if renamed is None:
                return None
            record = renamed
        shape = self.shape
        if shape is None or not FORMATS[shape].matches(record):
            shape = self._shape(record, source)
            if shape is None:
                return None
        module = FORMATS[shape]
        problems = self._too_many(record, source, module.FIELDS)
        parsed = problems or module.parse(record, source)
        if not isinstance(parsed, Example):
            for problem in parsed:
                self.on_problem(problem)
            return None
        if record.keys() - _KNOWN[shape]:
            self._ignore(record, source, shape)
        self.shape = shape
        for problem in remarks(parsed):
            self.on_problem(problem)
        return parsed

    def finish(self) -> None:
        """Say, once, what of the file was not used."""
        if self.ignored:
            names = [repr(name[:60]) for name in self.ignored]
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            self._note(
                next(iter(self.ignored.values())),
                "ignored_fields",
                f"not used: {', '.join(names[:MOST_NAMES])}{more}.",
                "Name a field by data.columns to use it.",
            )
        if self.data.columns and not self.is_mapped and self.facts.rows:
            names = list(self.data.columns.values())
            message = f"data.columns names {', '.join(names)}, which no row of this file has: it was read without."
            self._note(Source(self.facts.path, 1), "columns_unused", message, "")

    def _note(self, source: Source, code: str, message: str, fix: str) -> None:
        self.on_problem(Problem(source, code, message, fix, severity="warning"))

    def _renamed(self, record: dict[str, Any], source: Source) -> dict[str, Any] | None:
        columns = self.data.columns
        found = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
        if not found:
            return record
        self.is_mapped = True
        missing = [theirs for ours, theirs in columns.items() if ours not in found and ours in _REQUIRED]
        if missing:
            message = f"it has no {', '.join(map(repr, missing))}, which data.columns names; it has {_names(record)}."
            if self.facts.columns is not None:
                raise refusal(self.facts.path, 1, "missing_column", message, "Correct data.columns.")
            self.on_problem(Problem(source, "missing_column", message, "Correct the row, or data.columns."))
            return None
        taken = set(columns.values())
        for name, value in record.items():
            if name in found and name not in taken:
                self._ignore_one(f"{name} (data.columns takes another)", source)
            elif name not in taken:
                found[name] = value
        return found

    def _shape(self, record: dict[str, Any], source: Source) -> Shape | None:
        """The shape of a row that is not of the file's shape, or of one before that is known."""
        shape = find_shape(record)
        if shape is None and self.shape is not None:
            return self.shape  # which says what is missing
        if shape is None:
            message = f"no shape has its fields: {_names(record)}."
            fix = _shapes_fix(record)
            if self.facts.columns is not None:
                raise refusal(self.facts.path, 1, "unknown_shape", message, fix)
            self.on_problem(Problem(source, "unknown_shape", message, fix))
        elif self.shape is not None:
            message = f"the row has the shape {shape}, but those before it have {self.shape}."
            self.on_problem(
                Problem(source, "other_shape", message, "Put rows of another shape in a file of their own.")
            )
            return None
        return shape

    def _too_many(self, record: dict[str, Any], source: Source, fields: Sequence[str]) -> list[Problem]:
        limit = self.data.limits.messages
        return [
            Problem(
                source,
                "too_many_messages",
                f"{name} has {len(record[name]):,} entries, more than data.limits.messages, which is {limit:,}.",
                "Split the row, or raise the limit.",
            )
            for name in fields
            if isinstance(record.get(name), list) and len(record[name]) > limit
        ]

    def _ignore(self, record: dict[str, Any], source: Source, shape: Shape) -> None:
        for name in record.keys() - _KNOWN[shape] - self.ignored.keys():
            self._ignore_one(name, source)

    def _ignore_one(self, name: str, source: Source) -> None:
        if len(self.ignored) < 50 * MOST_NAMES:  # a row's fields are the data's choice: they must not fill the memory
            self.ignored.setdefault(name, source)


_KNOWN = {name: frozenset(module.FIELDS) for name, module in FORMATS.items()}
_REQUIRED = frozenset(name for module in FORMATS.values() for name in module.REQUIRED)
_OFTEN_PROMPT = ("question", "query", "input", "source", "document", "article", "context", "text", "user")
_OFTEN_COMPLETION = ("answer", "response", "output", "target", "summary", "reply", "assistant", "label")


def _shapes_fix(record: Mapping[str, Any]) -> str:
    asked = next((name for name in _OFTEN_PROMPT if name in record), None)
    answered = next((name for name in _OFTEN_COMPLETION if name in record), None)
    if asked and answered:
        return f"Did you mean data.columns: {{prompt: {asked}, completion: {answered}}}?"
    return (
        "A row has messages, or conversations, or instruction and output, or prompt and completion; "
        "name yours by data.columns, such as {prompt: question, completion: answer}."
    )


def _names(record: Mapping[str, Any]) -> str:
    names = [repr(name[:60]) for name in record] or ["none"]
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


def content_hash(example: Example) -> int:
    """64 bits of what an example says: roles, texts, what is trained, fields and tools, not where it stands.

    The same on every machine and in every release: the held-out rows of a data set follow from it.
    """
    content = [[[part.role, part.text, part.trained, part.fields] for part in example.parts], example.tools]
    packed = orjson.dumps(content, option=orjson.OPT_SORT_KEYS)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "big")


def is_held_out(content: int, share: float) -> bool:
    """Whether a row is held out: a function of the row alone, so rows that are added move no other row."""
    return content < _threshold(share)


def held_out_mask(hashes_I: NDArray[np.uint64], share: float) -> NDArray[np.bool_]:
    """Which rows are held out, by content hash; equal rows are always on one side.

    A share that is not 0 holds out at least one row and leaves at least one, if there are two different ones: where
    chance leaves a side empty, the smallest hash is held out, or the largest is not. See `split_note`.
    """
    mask_I = hashes_I < np.uint64(_threshold(share))
    if share == 0 or len(hashes_I) == 0 or hashes_I.min() == hashes_I.max():
        return np.zeros(len(hashes_I), np.bool_)
    if not mask_I.any():
        return np.asarray(hashes_I == hashes_I.min())
    if mask_I.all():
        return np.asarray(hashes_I != hashes_I.max())
    return mask_I


def split_note(hashes_I: NDArray[np.uint64], share: float) -> str | None:
    """What to say when the split by share was not possible as it stands; None when it was."""
    num_held = int((hashes_I < np.uint64(_threshold(share))).sum())
    if share == 0 or 0 < num_held < len(hashes_I):
        return None
    mask_I = held_out_mask(hashes_I, share)
    if not mask_I.any():
        return "nothing is held out: it takes two different rows"
    return (
        f"data.held_out: {share:g} of {len(hashes_I):,} rows is {'none' if num_held == 0 else 'all'} by content hash: "
        f"{int(mask_I.sum()):,} held out instead"
    )


def _threshold(share: float) -> int:
    return int(share * 2.0**64)  # exact: a product with a power of two
