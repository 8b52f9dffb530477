"""One pass over data files: examples in, record batches of encoded rows out, everything left out counted."""

# I rows, T tokens

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.examples import content_hash, examples, input_hash
from tunesmith.data.opening import FileFacts
from tunesmith.data.render import Renderer
from tunesmith.recipe.knobs import Data, DataFile
from tunesmith.types import Example, Problem, Row, Source

CHUNK_EXAMPLES = 512
CHUNK_CHARS = 4_000_000
"""A chunk is rendered and tokenized at once: whichever of the two bounds is met first."""
BATCH_ROWS = 8192
BATCH_TOKENS = 4_000_000
"""A record batch is written at once."""
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
    ]
)

OnProblem = Callable[[Problem], None]
OnProgress = Callable[[int, int, int], None]
"""(rows encoded, bytes read, bytes in all)"""
_Found = tuple[int, tuple[int, int], Row]
"""The index of a file, the hashes of an example's content and input, and one row of it."""


class Encoding:
    """The rows of `files` as record batches, in memory bounded by a chunk of examples and a batch of rows.

    Counts are complete when the batches have been taken. `num_bytes`: of all files.
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
        self._data = data
        self._files = files
        self._renderer = renderer
        self._num_bytes = num_bytes
        self._facts: list[FileFacts] = []
        self._on_problem = on_problem
        self._progress = progress
        self._last_bad: Source | None = None
        self.num_rows = 0
        self.skipped = 0
        self.errors: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.problems: list[Problem] = []
        self.vocabulary: dict[str, int] = {}
        """Classes by their first appearance, which rows count by until it is known what a model learns."""
        self.many: bool | None = None
        """Whether classes came as lists; None: rows without classes."""

    def batches(self) -> Iterator[pa.RecordBatch]:
        rows: list[_Found] = []
        num_tokens = 0
        for chunk in self._chunks():
            encoded = self._renderer.encode(
                [example for _, example in chunk], on_warning=self._hear, vocabulary=self.vocabulary
            )
            for (file, example), result in zip(chunk, encoded, strict=True):
                content = content_hash(example), input_hash(example)
                for item in result:
                    if isinstance(item, Problem):
                        self._hear(item)
                        continue
                    rows.append((file, content, item))
                    num_tokens += len(item.ids)
                    self.num_rows += 1
                    if item.labels is not None:
                        self.many = bool(self.many) or example.many
            if len(rows) >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
                yield self._batch(rows)
                rows, num_tokens = [], 0
            self._progress(self.num_rows, sum(file.done_bytes for file in self._facts), self._num_bytes)
        if rows:
            yield self._batch(rows)
        self._progress(self.num_rows, self._num_bytes, self._num_bytes)

    def _chunks(self) -> Iterator[list[tuple[int, Example]]]:
        """Examples with the index of their file."""
        chunk: list[tuple[int, Example]] = []
        num_chars = 0
        for file, example in examples(
            self._files, self._data, self._hear, facts=self._facts, task=self._renderer.task_name
        ):
            chunk.append((file, example))
            num_chars += sum(len(part.text) for part in example.parts)
            if len(chunk) >= CHUNK_EXAMPLES or num_chars >= CHUNK_CHARS:
                yield chunk
                chunk, num_chars = [], 0
        if chunk:
            yield chunk

    def _batch(self, rows: Sequence[_Found]) -> pa.RecordBatch:
        labels = [np.empty(0, np.int64) if row.labels is None else row.labels for _, _, row in rows]
        columns = [
            _lists([row.ids for _, _, row in rows]),
            _lists([row.trained for _, _, row in rows]),
            pa.array(np.array([len(row.ids) for _, _, row in rows], np.int32)),
            pa.array(np.array([row.trained.sum() for _, _, row in rows], np.int32)),
            pa.array(np.array([file for file, _, _ in rows], np.int32)),
            pa.array(np.array([row.source.line for _, _, row in rows], np.int64)),
            pa.array(np.array([content for _, (content, _), _ in rows], np.uint64)),
            pa.array(np.array([read for _, (_, read), _ in rows], np.uint64)),
            _lists(labels),
            pa.array(np.array([row.second for _, _, row in rows], np.int32)),
            pa.array(np.array([row.num_bytes for _, _, row in rows], np.int32)),
        ]
        return pa.record_batch(columns, schema=SCHEMA)

    def _hear(self, problem: Problem) -> None:
        counts = self.errors if problem.severity == "error" else self.warnings
        counts[problem.code] += 1
        if problem.severity == "error" and problem.source != self._last_bad:
            self.skipped += 1  # the problems of one row come one after the other
            self._last_bad = problem.source
        if len(self.problems) < self._data.limits.problems:
            self.problems.append(problem)
            self._on_problem(problem)


def _lists(arrays: Sequence[NDArray[np.generic]]) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))
