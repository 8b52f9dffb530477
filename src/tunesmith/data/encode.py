"""Data files to record batches of encoded rows; everything left out is counted."""

# T tokens

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.branches import line_tokens
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import content_hash, examples, input_hash
from tunesmith.data.read import OnProblem
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
OnProgress = Callable[[int, int, int], None]
"""(rows encoded, bytes read, bytes in all)"""


class EncodedRow(NamedTuple):
    """One row of an example, and what a store keeps of the example."""

    row: Row
    file: int
    """Index of its file."""
    content: int
    input: int
    """See `examples.content_hash` and `examples.input_hash`."""
    many: bool


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


def encode(renderer: Renderer, chunk: Chunk, vocabulary: dict[str, int], on_problem: OnProblem) -> list[EncodedRow]:
    """The rows of a chunk, labels by `vocabulary`, to which new classes are added. Raises as `Renderer.encode`."""
    rows = []
    encoded = renderer.encode([example for _, example in chunk], on_warning=on_problem, vocabulary=vocabulary)
    for (file, example), result in zip(chunk, encoded, strict=True):
        hashes = content_hash(example), input_hash(example)
        for item in result:
            if isinstance(item, Problem):
                on_problem(item)
            else:
                rows.append(EncodedRow(item, file, *hashes, example.many))
    return rows


def renamed(rows: pa.RecordBatch, names: Sequence[str], vocabulary: dict[str, int]) -> pa.RecordBatch:
    """Rows whose labels count by `names`, with labels by `vocabulary`, to which new classes are added."""
    ids = np.array([vocabulary.setdefault(name, len(vocabulary)) for name in names] or [0], np.int64)
    at = SCHEMA.get_field_index("labels")
    labels = rows.column(at)
    local = labels.values.to_numpy()
    values = np.where(local < 0, local, ids[np.maximum(local, 0)])
    return rows.set_column(at, SCHEMA.field(at), pa.ListArray.from_arrays(labels.offsets, pa.array(values)))


def complete(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows as an earlier version wrote them, with empty lists in the columns that it did not have."""
    for field in SCHEMA:
        if field.name not in rows.schema.names:
            offsets = pa.array(np.zeros(rows.num_rows + 1, np.int32))
            empty = pa.ListArray.from_arrays(offsets, pa.array([], field.type.value_type))
            rows = rows.append_column(field, empty)
    return rows


def columns(found: Sequence[EncodedRow]) -> pa.RecordBatch:
    """Rows as they are stored."""

    def numbers(values: Iterator[int], dtype: Any) -> pa.Array:
        return pa.array(np.fromiter(values, dtype, len(found)))

    nothing, rows = np.empty(0, np.int64), [one.row for one in found]
    arrays = [
        _lists([row.ids for row in rows], np.int32),
        _lists([row.trained for row in rows], np.bool_),
        numbers((line_tokens(row) for row in rows), np.int32),
        numbers((int(np.count_nonzero(row.trained)) for row in rows), np.int32),
        numbers((one.file for one in found), np.int32),
        numbers((row.source.line for row in rows), np.int64),
        numbers((one.content for one in found), np.uint64),
        numbers((one.input for one in found), np.uint64),
        _lists([nothing if row.labels is None else row.labels for row in rows], np.int64),
        numbers((row.second for row in rows), np.int32),
        numbers((row.num_bytes for row in rows), np.int32),
        _lists([np.array(row.branches, np.int32) for row in rows], np.int32),
        _lists([np.array(row.values, np.float64) for row in rows], np.float64),
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


def _lists(arrays: Sequence[NDArray[Any]], dtype: Any) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.empty(0, dtype), *arrays])))


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
        rows: list[EncodedRow] = []
        num_tokens = 0
        facts: list[FileFacts] = []
        task = self._renderer.task_name
        for chunk in chunks(examples(self._files, self._data, self._hear, facts=facts, task=task)):
            encoded = encode(self._renderer, chunk, self.vocabulary, self._hear)
            rows += encoded
            num_tokens += sum(len(one.row.ids) for one in encoded)
            self.num_rows += len(encoded)
            for one in encoded:
                if one.row.labels is not None:
                    self.many = bool(self.many) or one.many
            if len(rows) >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
                yield columns(rows)
                rows, num_tokens = [], 0
            self._progress(self.num_rows, sum(file.done_bytes for file in facts), self._num_bytes)
        if rows:
            yield columns(rows)
        self._progress(self.num_rows, self._num_bytes, self._num_bytes)

    def _hear(self, problem: Problem) -> None:
        counts = self.errors if problem.severity == "error" else self.warnings
        counts[problem.code] += 1
        if problem.severity == "error" and problem.source != self._last_bad:
            self.skipped += 1  # the problems of one row come one after the other
            self._last_bad = problem.source
        self._list(problem)
