"""One pass over data files: examples in, record batches of encoded rows out, everything left out counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import pyarrow as pa

from tunesmith.data.chunks import Chunk, Encoded, joined
from tunesmith.data.encoders import encode_all
from tunesmith.data.examples import examples
from tunesmith.data.opening import FileFacts
from tunesmith.data.render import Renderer
from tunesmith.errors import TunesmithError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, Problem, Source

CHUNK_EXAMPLES = 512
CHUNK_CHARS = 4_000_000
"""A chunk is rendered and tokenized at once: whichever of the two bounds is met first."""
BATCH_ROWS = 8192
BATCH_TOKENS = 4_000_000
"""A record batch is written at once."""
OnProblem = Callable[[Problem], None]
OnProgress = Callable[[int, int, int], None]
"""(rows encoded, bytes read, bytes in all)"""


@dataclass(frozen=True, slots=True)
class _Read:
    """A chunk, and what was found while it was read."""

    chunk: Chunk
    problems: Sequence[Problem]
    done_bytes: int
    error: TunesmithError | None = None
    """What ended the reading."""


class Encoding:
    """The rows of `files` as record batches, in memory bounded by chunks of examples and a batch of rows.

    With `num_proc` above 1 processes beside this one encode; everything is the same but the time. Counts are complete
    when the batches have been taken. `num_bytes`: of all files.
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
        num_proc: int = 1,
    ) -> None:
        self._data = data
        self._files = files
        self._renderer = renderer
        self._num_bytes = num_bytes
        self._num_proc = num_proc
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
        self.notes: list[str] = []
        """About the processes that encoded."""

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises `DataError` for a file that cannot be read, when the rows before it were taken."""
        parts: list[Encoded] = []
        num_rows = num_tokens = 0
        encoded_reads = encode_all(self._reads(), self._renderer, num_proc=self._num_proc, on_note=self.notes.append)
        with closing(encoded_reads):
            for read, encoded in encoded_reads:
                for problem in (*read.problems, *encoded.problems):
                    self._hear(problem)
                if read.error is not None:
                    raise read.error
                parts.append(encoded)
                num_rows += encoded.rows.num_rows
                num_tokens += encoded.num_tokens
                self.num_rows += encoded.rows.num_rows
                if encoded.many is not None:
                    self.many = bool(self.many) or encoded.many
                if num_rows >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
                    yield self._batch(parts)
                    parts, num_rows, num_tokens = [], 0, 0
                self._progress(self.num_rows, read.done_bytes, self._num_bytes)
        if num_rows:
            yield self._batch(parts)
        self._progress(self.num_rows, self._num_bytes, self._num_bytes)

    def _reads(self) -> Iterator[_Read]:
        """Problems found while a chunk is read come with it, so that they are heard in their order."""
        facts: list[FileFacts] = []
        chunk: list[tuple[int, Example]] = []
        problems: list[Problem] = []
        num_chars = 0
        error = None

        def done() -> int:
            return sum(file.done_bytes for file in facts)

        found = examples(
            self._files,
            self._data,
            problems.append,
            facts=facts,
            task=self._renderer.task_name,
        )
        try:
            for file, example in found:
                chunk.append((file, example))
                num_chars += sum(len(part.text) for part in example.parts)
                if len(chunk) >= CHUNK_EXAMPLES or num_chars >= CHUNK_CHARS:
                    yield _Read(chunk, tuple(problems), done())
                    problems.clear()
                    chunk, num_chars = [], 0
        except TunesmithError as raised:
            chunk, error = [], raised
        yield _Read(chunk, tuple(problems), done(), error)

    def _batch(self, parts: Sequence[Encoded]) -> pa.RecordBatch:
        return joined(parts, self.vocabulary)

    def _hear(self, problem: Problem) -> None:
        counts = self.errors if problem.severity == "error" else self.warnings
        counts[problem.code] += 1
        if problem.severity == "error" and problem.source != self._last_bad:
            self.skipped += 1  # the problems of one row come one after the other
            self._last_bad = problem.source
        if len(self.problems) < self._data.limits.problems:
            self.problems.append(problem)
            self._on_problem(problem)
