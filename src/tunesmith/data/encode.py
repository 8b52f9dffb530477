"""Data files to record batches of encoded rows; everything left out is counted."""

# T tokens

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.branches import line_tokens
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import both_hashes, examples
from tunesmith.data.renderer import Renderer
from tunesmith.errors import TunesmithError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, Problem, Row, Source

CHUNK_EXAMPLES = 512
CHUNK_CHARS = 4_000_000
"""A chunk is rendered and tokenized at once: it ends at whichever of the two bounds is met first."""
BATCH_ROWS = 8192
BATCH_TOKENS = 4_000_000
"""Bounds of a record batch, which is written at once."""
COLLECT_AFTER = 100_000
"""Threshold of the garbage collector while rows are encoded; the default costs a fifth of the time."""
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("length", pa.int32()),
        ("targets", pa.int32()),
        ("file", pa.int32()),
        ("line", pa.int64()),
        ("hash", pa.uint64()),
        ("input", pa.uint64()),
        ("labels", pa.list_(pa.int64())),
        ("second", pa.int32()),
        ("bytes", pa.int32()),
        ("branches", pa.list_(pa.int32())),
        ("values", pa.list_(pa.float64())),
    ]
)
Chunk = Sequence[tuple[int, Example]]
"""Examples, each with the index of its file."""
OnProblem = Callable[[Problem], None]
OnProgress = Callable[[int, int, int], None]
"""(rows encoded, bytes read, bytes in all)"""
_Found = tuple[int, tuple[int, int], Row]
"""The index of a file, the hashes of an example's content and input, and one row of it."""


@contextmanager
def rare_collection() -> Iterator[None]:
    """A block in which the garbage collector runs rarely."""
    before = gc.get_threshold()
    if before[0]:  # 0: it is off
        gc.set_threshold(max(before[0], COLLECT_AFTER), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def chunks(found: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    """Examples in chunks. Raises as `found` does, after the chunks before."""
    chunk: list[tuple[int, Example]] = []
    num_chars, error = 0, None
    try:
        for file, example in found:
            chunk.append((file, example))
            num_chars += sum(len(part.text) for part in example.first_line)
            if len(chunk) >= CHUNK_EXAMPLES or num_chars >= CHUNK_CHARS:
                yield chunk
                chunk, num_chars = [], 0
    except TunesmithError as raised:
        error = raised
    if chunk:
        yield chunk
    if error is not None:
        raise error


@dataclass(frozen=True, slots=True)
class Encoded:
    """The rows of a chunk and its problems."""

    rows: pa.RecordBatch
    """Labels by the order of `classes`."""
    problems: Sequence[Problem]
    classes: tuple[str, ...]
    """By first appearance."""
    many: bool | None
    """Whether classes came as lists; None: rows without classes."""

    @property
    def num_tokens(self) -> int:
        return len(self.rows.column("ids").values)


def encode(renderer: Renderer, chunk: Chunk) -> Encoded:
    """The rows of a chunk. Raises as `Renderer.encode`."""
    problems: list[Problem] = []
    vocabulary: dict[str, int] = {}
    examples = [example for _, example in chunk]
    rows: list[_Found] = []
    many: bool | None = None
    encoded = renderer.encode(examples, on_warning=problems.append, vocabulary=vocabulary)
    for (file, example), result in zip(chunk, encoded, strict=True):
        content = both_hashes(example)
        for item in result:
            if isinstance(item, Problem):
                problems.append(item)
                continue
            rows.append((file, content, item))
            if item.labels is not None:
                many = bool(many) or example.many
    return Encoded(_columns(rows), problems, tuple(vocabulary), many)


def joined(parts: Sequence[Encoded], vocabulary: dict[str, int]) -> pa.RecordBatch:
    """The rows of all parts, their labels by `vocabulary`, to which classes that it does not have are added."""
    batches = []
    for part in parts:
        ids = [vocabulary.setdefault(name, len(vocabulary)) for name in part.classes]
        batches.append(part.rows if ids == list(range(len(ids))) else _renamed(part.rows, np.array(ids, np.int64)))
    (whole,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return whole


def complete(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows as an earlier version wrote them, with empty lists in the columns that it did not have."""
    for field in SCHEMA:
        if field.name not in rows.schema.names:
            offsets = pa.array(np.zeros(rows.num_rows + 1, np.int32))
            empty = pa.ListArray.from_arrays(offsets, pa.array([], field.type.value_type))
            rows = rows.append_column(field, empty)
    return rows


def _columns(rows: Sequence[_Found]) -> pa.RecordBatch:
    def numbers(values: Iterator[int], dtype: Any) -> pa.Array:
        return pa.array(np.fromiter(values, dtype, len(rows)))

    nothing = np.empty(0, np.int64)
    trained = [row.trained for _, _, row in rows]
    columns = [
        _lists([row.ids for _, _, row in rows], np.int32),
        _lists(trained, np.bool_),
        numbers((line_tokens(row) for _, _, row in rows), np.int32),
        numbers((int(np.count_nonzero(trained_T)) for trained_T in trained), np.int32),
        numbers((file for file, _, _ in rows), np.int32),
        numbers((row.source.line for _, _, row in rows), np.int64),
        numbers((content for _, (content, _), _ in rows), np.uint64),
        numbers((read for _, (_, read), _ in rows), np.uint64),
        _lists([nothing if row.labels is None else row.labels for _, _, row in rows], np.int64),
        numbers((row.second for _, _, row in rows), np.int32),
        numbers((row.num_bytes for _, _, row in rows), np.int32),
        _lists([np.array(row.branches, np.int32) for _, _, row in rows], np.int32),
        _lists([np.array(row.values, np.float64) for _, _, row in rows], np.float64),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(arrays: Sequence[NDArray[Any]], dtype: Any) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.empty(0, dtype), *arrays])))


def _renamed(rows: pa.RecordBatch, ids: NDArray[np.int64]) -> pa.RecordBatch:
    at = SCHEMA.get_field_index("labels")
    labels = rows.column(at)
    local = labels.values.to_numpy()
    values = np.where(local < 0, local, ids[np.maximum(local, 0)])
    return rows.set_column(at, SCHEMA.field(at), pa.ListArray.from_arrays(labels.offsets, pa.array(values)))


class EncodingCounts:
    """Counts of rows that are being encoded; complete when all of them were."""

    def __init__(self, data: Data, on_problem: OnProblem, progress: OnProgress) -> None:
        self._data, self._on_problem, self._progress = data, on_problem, progress
        self.num_rows = self.skipped = 0
        self.errors: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.vocabulary: dict[str, int] = {}
        """Classes by their first appearance, which rows count by until it is known what a model learns."""
        self.many: bool | None = None
        """Whether classes came as lists; None: rows without classes."""

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """The rows as record batches."""
        raise NotImplementedError

    def _list(self, problem: Problem) -> None:
        if len(self.problems) < self._data.limits.problems:
            self.problems.append(problem)
            self._on_problem(problem)


class Encoding(EncodingCounts):
    """The rows of `files` as record batches, in memory bounded by chunks of examples and a batch of rows.

    `num_bytes`: of all files.
    """

    def __init__(
        self,
        data: Data,
        files: Sequence[DataFile],
        renderer: Renderer,
        *,
        num_bytes: int,
        on_problem: OnProblem,
        progress: OnProgress,
    ) -> None:
        super().__init__(data, on_problem, progress)
        self._files, self._renderer, self._num_bytes = files, renderer, num_bytes
        self._last_bad: Source | None = None

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises `DataError` for a file that cannot be read, when the rows before it were taken."""
        parts: list[Encoded] = []
        num_rows = num_tokens = 0
        facts: list[FileFacts] = []
        task = self._renderer.task_name
        for chunk in chunks(examples(self._files, self._data, self._hear, facts=facts, task=task)):
            encoded = encode(self._renderer, chunk)
            for problem in encoded.problems:
                self._hear(problem)
            parts.append(encoded)
            num_rows += encoded.rows.num_rows
            num_tokens += encoded.num_tokens
            self.num_rows += encoded.rows.num_rows
            if encoded.many is not None:
                self.many = bool(self.many) or encoded.many
            if num_rows >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
                yield joined(parts, self.vocabulary)
                parts, num_rows, num_tokens = [], 0, 0
            self._progress(self.num_rows, sum(file.done_bytes for file in facts), self._num_bytes)
        if num_rows:
            yield joined(parts, self.vocabulary)
        self._progress(self.num_rows, self._num_bytes, self._num_bytes)

    def _hear(self, problem: Problem) -> None:
        counts = self.errors if problem.severity == "error" else self.warnings
        counts[problem.code] += 1
        if problem.severity == "error" and problem.source != self._last_bad:
            self.skipped += 1  # the problems of one row come one after the other
            self._last_bad = problem.source
        self._list(problem)
