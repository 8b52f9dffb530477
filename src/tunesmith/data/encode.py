"""Data files to record batches of encoded rows, by one process or several; everything left out is counted."""

# T tokens

from __future__ import annotations

import copyreg
import gc
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.addresses import is_address, known, size_of
from tunesmith.data.branches import line_tokens
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import content_hash, examples, input_hash
from tunesmith.data.problems import SKIP, num_refused, refused
from tunesmith.data.read import OnProblem
from tunesmith.data.renderer import Renderer
from tunesmith.environment import num_cpus, spawning
from tunesmith.errors import DataError, TunesmithError
from tunesmith.phrases import plural
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, Part, Problem, Row, Source

T = TypeVar("T")

CHUNK_EXAMPLES = 512
CHUNK_CHARS = 4_000_000
"""A chunk is rendered and tokenized at once: it ends at whichever of the two bounds is met first."""
BATCH_ROWS = 8192
BATCH_TOKENS = 4_000_000
"""Bounds of a record batch, which is written at once."""
WORTH_BYTES = 8 * 1024**2
"""Size of files from which on processes are worth their start."""
MOST_PROCESSES = 8
"""One process reads for them and writes, and cannot feed more."""
AHEAD = 2
"""Chunks that wait for each process, and are memory."""
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


class Encoded(NamedTuple):
    """The rows of a chunk."""

    rows: pa.RecordBatch
    names: Sequence[str]
    """Classes by their first appearance in the chunk, which its rows count by."""
    many: bool | None
    """Whether classes came as lists; None: rows without classes."""
    problems: Sequence[Problem]


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


def encode(renderer: Renderer, chunk: Chunk) -> Encoded:
    """The rows of a chunk, whatever came before it. Raises as `Renderer.encode`."""
    vocabulary: dict[str, int] = {}
    problems: list[Problem] = []
    found: list[tuple[Row, int, int, int]] = []
    many: bool | None = None
    results = renderer.encode([example for _, example in chunk], on_warning=problems.append, vocabulary=vocabulary)
    for (file, example), result in zip(chunk, results, strict=True):
        hashes = content_hash(example), input_hash(example)
        for item in result:
            if isinstance(item, Problem):
                problems.append(item)
                continue
            found.append((item, file, *hashes))
            if item.labels is not None:
                many = bool(many) or example.many
    return Encoded(columns(found), list(vocabulary), many, problems)


@contextmanager
def _processes(renderer: Renderer, num: int) -> Iterator[Callable[[Chunk], Callable[[], Encoded]]]:
    """A function that has a chunk encoded, and returns one that waits for its rows; 1: by this process, then."""
    if num == 1:
        yield lambda chunk: partial(encode, renderer, chunk)
        return
    pool = ProcessPoolExecutor(num, multiprocessing.get_context("spawn"), _begin, (renderer,))

    def begin(chunk: Chunk) -> Callable[[], Encoded]:
        with spawning():
            return pool.submit(_encode_here, chunk).result

    try:
        yield begin
    except BaseException as error:  # a template that never ends would be waited for, after Ctrl-C too
        for process in list((pool._processes or {}).values()):
            process.kill()
        # Else the pool waits for the rest of a result that a process was sending.
        pool._result_queue._writer.close()  # type: ignore[attr-defined]
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise TunesmithError("a process that encodes rows ended: memory ran out. Set data.num_proc: 1.") from error
        raise
    pool.shutdown()


def _pickle_by_fields(cls: type[Any]) -> None:
    """Send instances to a process as their fields: frozen dataclasses with slots else take three times as long."""
    values = attrgetter(*(one.name for one in fields(cls)))
    copyreg.pickle(cls, lambda instance: (cls, values(instance)))


for _cls in (Source, Part, Example):
    _pickle_by_fields(_cls)

_RENDERER: list[Renderer] = []
"""The one of a process that encodes for another."""


def _begin(renderer: Renderer) -> None:
    """Prepare a process that encodes for another, and ends with that."""

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    _RENDERER.append(renderer)
    gc.freeze()  # the collector need not look through the libraries again and again
    gc.set_threshold(100_000)  # rows hold no circles


def _encode_here(chunk: Chunk) -> Encoded:
    return encode(_RENDERER[0], chunk)


def _ahead(items: Iterator[T], num: int) -> Iterator[T]:
    """Each item when there are `num` after it, or no more; an error comes after the items before it."""
    waiting, error = deque[T](), None
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > num:
                yield waiting.popleft()
    except TunesmithError as raised:
        error = raised
    yield from waiting
    if error is not None:
        raise error


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


def columns(found: Sequence[tuple[Row, int, int, int]]) -> pa.RecordBatch:
    """Rows as they are stored: each with its file, and the hashes of its example's content and input."""

    def numbers(values: Iterable[int], dtype: Any) -> pa.Array:
        return pa.array(np.fromiter(values, dtype, len(found)))

    nothing = np.empty(0, np.int64)
    rows, files, contents, inputs = zip(*found, strict=True) if found else ((), (), (), ())
    arrays = [
        _lists([row.ids for row in rows], np.int32),
        _lists([row.trained for row in rows], np.bool_),
        numbers((line_tokens(row) for row in rows), np.int32),
        numbers((int(np.count_nonzero(row.trained)) for row in rows), np.int32),
        numbers(files, np.int32),
        numbers((row.source.line for row in rows), np.int64),
        numbers(contents, np.uint64),
        numbers(inputs, np.uint64),
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

    `num_bytes`: of all files. By data.num_proc processes, or as many as their size is worth; the rows are the same.
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
        self._num_proc = data.num_proc or (min(num_cpus(), MOST_PROCESSES) if num_bytes >= WORTH_BYTES else 1)
        self._last_bad: Source | None = None

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises `DataError` for a file that cannot be read, when the rows before it were taken."""
        parts: list[pa.RecordBatch] = []
        num_rows = num_tokens = 0
        facts: list[FileFacts] = []
        read = examples(self._files, self._data, self._hear, facts=facts, task=self._renderer.task_name)
        with _processes(self._renderer, self._num_proc) as begin:
            begun = ((begin(chunk), sum(file.done_bytes for file in facts)) for chunk in chunks(read))
            for rows_of_chunk, done_bytes in _ahead(begun, AHEAD * self._num_proc if self._num_proc > 1 else 0):
                rows, names, many, problems = rows_of_chunk()
                for problem in problems:
                    self._hear(problem)
                parts.append(renamed(rows, names, self.vocabulary))
                num_rows += rows.num_rows
                num_tokens += len(rows.column("ids").values)
                self.num_rows += rows.num_rows
                if many is not None:
                    self.many = bool(self.many) or many
                if num_rows >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
                    yield pa.concat_batches(parts)
                    parts, num_rows, num_tokens = [], 0, 0
                self._progress(self.num_rows, done_bytes, self._num_bytes)
        if num_rows:
            yield pa.concat_batches(parts)
        self._progress(self.num_rows, self._num_bytes, self._num_bytes)

    def _hear(self, problem: Problem) -> None:
        counts = self.errors if problem.severity == "error" else self.warnings
        counts[problem.code] += 1
        if problem.severity == "error" and problem.source != self._last_bad:
            self.skipped += 1  # the problems of one row come one after the other
            self._last_bad = problem.source
        self._list(problem)


PART_BYTES = 256 * 1024 * 1024
"""Least size of a part of the files that are here only while they are read."""


def in_parts(files: Sequence[DataFile]) -> list[list[DataFile]]:
    """Files in parts of at least PART_BYTES that are streamed, in their order; one part if none is."""
    parts: list[list[DataFile]] = [[]]
    to_come = 0
    for file in files:
        if to_come >= PART_BYTES:
            parts.append([])
            to_come = 0
        parts[-1].append(file)
        to_come += size_of(file.at) if is_address(file.at) and not known(file.at).is_kept else 0
    return parts


class JoinedParts(EncodingCounts):
    """The rows of parts one after the other; `Encoding` of files that are here only while they are read.

    Each part is a row store of its own, so that an interrupted encoding continues with the first one that is not there.
    `build`: `dataset.build` of `files`, with `on_problem` and `progress`, into the folder of parts.
    """

    def __init__(
        self, data: Data, parts: Sequence[Sequence[DataFile]], build: Callable[..., Any], **listeners: Any
    ) -> None:
        super().__init__(data, **listeners)
        self._parts, self._build = parts, build

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises as `dataset.build`, and DataError after the first part with rows for which the data is refused."""
        first_file, done_bytes = 0, 0
        total = sum(size_of(file.at) for part in self._parts for file in part)
        for part in self._parts:

            def progress(
                rows: int, done: int, of: int, before: int = done_bytes, num_rows: int = self.num_rows
            ) -> None:
                self._progress(num_rows + rows, before + done, total)

            store = self._build(files=part, on_problem=self._list, progress=progress)
            summary = store.summary
            self.num_rows += summary.num_rows
            self.skipped += summary.skipped
            self.errors.update(summary.errors)
            self.warnings.update(summary.warnings)
            if summary.many is not None:
                self.many = bool(self.many) or summary.many
            if num_bad := num_refused(self._data, self.errors):  # the others may take days
                what = f"{plural(num_bad, 'problem')} in the rows of the first {plural(first_file + len(part), 'file')}"
                way = f"Correct the data, or leave such rows out: {SKIP}."
                raise DataError(f"{what}; the others were not read. {way}", refused(self._data, self.problems))
            for batch in store.batches():
                yield renamed(_renumbered(batch, first_file), store.labels.vocabulary, self.vocabulary)
            first_file += len(part)
            done_bytes += sum(size_of(file.at) for file in part)


def _renumbered(rows: pa.RecordBatch, first_file: int) -> pa.RecordBatch:
    at = SCHEMA.get_field_index("file")
    files = rows.column(at).to_numpy() + np.int32(first_file)
    return rows.set_column(at, SCHEMA.field(at), pa.array(files.astype(np.int32)))
