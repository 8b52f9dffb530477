"""Data files to record batches of encoded rows, by one process or several; everything left out is counted."""

# T tokens

from __future__ import annotations

import copyreg
import gc
import multiprocessing
import os
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from operator import attrgetter
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.addresses import is_address, known, size_of
from tunesmith.data.branches import line_tokens
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import content_hash, examples, input_hash
from tunesmith.data.problems import SKIP, SKIPPING, num_refused, refused
from tunesmith.data.read import OnProblem
from tunesmith.data.renderer import Renderer
from tunesmith.environment.children import spawning
from tunesmith.environment.process import num_cpus
from tunesmith.errors import DataError, TunesmithError
from tunesmith.phrases import plural
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, ImageRef, Part, Problem, Row, Source

T = TypeVar("T")

CHUNK_EXAMPLES = 512
ENCODED_CHARS = 4_000_000
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
        ("keys", pa.list_(pa.int64())),
        ("images", pa.list_(pa.uint64())),
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
    images: Sequence[ImageRef] = ()
    """Images of the rows, each as often as it is there."""


def chunks(found: Iterator[tuple[int, Example]]) -> Iterator[list[tuple[int, Example]]]:
    """Examples in chunks. Raises as `found` does, after the chunks before."""
    chunk: list[tuple[int, Example]] = []
    num_chars = 0
    try:
        for file, example in found:
            chunk.append((file, example))
            num_chars += sum(len(part.text) for part in example.first_line)
            num_chars += sum(len(image.data) for image in example.images)
            if len(chunk) >= CHUNK_EXAMPLES or num_chars >= ENCODED_CHARS:
                yield chunk
                chunk, num_chars = [], 0
    except TunesmithError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def encode(renderer: Renderer, chunk: Chunk) -> Encoded:
    """Encode the rows of a chunk, independently of earlier chunks. Raises as `Renderer.encode`."""
    vocabulary: dict[str, int] = {}
    problems: list[Problem] = []
    encoded: list[tuple[Row, int, int, int]] = []
    many: bool | None = None
    images: list[ImageRef] = []
    results = renderer.encode([example for _, example in chunk], on_warning=problems.append, vocabulary=vocabulary)
    for (file, example), result in zip(chunk, results, strict=True):
        hashes = content_hash(example), input_hash(example)
        for item in result:
            if isinstance(item, Problem):
                problems.append(item)
                continue
            encoded.append((item, file, *hashes))
            images += example.images
            if item.labels is not None:
                many = bool(many) or example.many
    return Encoded(columns(encoded), list(vocabulary), many, problems, images)


@contextmanager
def _processes(renderer: Renderer, num: int) -> Iterator[Callable[[Chunk], Callable[[], Encoded]]]:
    """A function that starts the encoding of a chunk and returns one that waits for its rows. With `num` 1 the
    second encodes, in this process.

    Processes take chunks by turns, so that the rows of each come in the order in which its chunks were sent.
    """
    if num == 1:
        yield lambda chunk: partial(encode, renderer, chunk)
        return
    context, started = multiprocessing.get_context("spawn"), list[tuple[BaseProcess, Connection]]()
    try:
        with spawning():
            for _ in range(num):
                ours, theirs = context.Pipe()
                process = context.Process(target=_encode_for, args=(theirs,), daemon=True)
                process.start()
                started.append((process, ours))
                theirs.close()
        for _, ours in started:  # not as an argument of each, which would be read before the next one starts
            with _alive():
                ours.send(renderer)
        turns = cycle([ours for _, ours in started])

        def begin(chunk: Chunk) -> Callable[[], Encoded]:
            ours = next(turns)
            with _alive():
                ours.send(chunk)
            return partial(_rows_from, ours)

        yield begin
    finally:  # not waited for: a template may never end
        for child, ours in started:
            child.kill()
            child.join()
            ours.close()


@contextmanager
def _alive() -> Iterator[None]:
    """A block that raises `TunesmithError` if a process ends, even in the middle of a message."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise TunesmithError("a process that encodes rows ended: memory ran out. Set data.num_proc: 1.") from error


def _rows_from(process: Connection) -> Encoded:
    with _alive():
        answer: Encoded | Exception = process.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _encode_for(parent: Connection) -> None:
    """Encode chunks for another process, which sends a renderer first, and end when that process ends."""
    sent = SimpleQueue[Any]()

    def read() -> None:
        while True:
            try:
                sent.put(parent.recv())
            except (EOFError, OSError):
                os._exit(1)
            except Exception as error:  # a class that cannot be imported here
                sent.put(error)

    threading.Thread(target=read, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core
    gc.set_threshold(100_000)  # rows hold no circles
    renderer = sent.get()
    while True:
        chunk = sent.get()
        try:
            for received in (renderer, chunk):
                if isinstance(received, Exception):
                    raise received
            answer: Encoded | Exception = encode(renderer, chunk)
        except Exception as error:
            if sys.version_info >= (3, 11):
                error.add_note(traceback.format_exc())  # which the other process does not have
            answer = error
        parent.send(answer)


def _pickle_by_fields(cls: type[Any]) -> None:
    """Send instances to a process as their fields: frozen dataclasses with slots take three times as long."""
    values = attrgetter(*(field.name for field in fields(cls)))
    copyreg.pickle(cls, lambda instance: (cls, values(instance)))


for _cls in (Source, ImageRef, Part, Example):
    _pickle_by_fields(_cls)


def _ahead(items: Iterator[T], num: int) -> Iterator[T]:
    """Each item when there are `num` after it, or no more; an error comes after the items before it."""
    waiting = deque[T]()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > num:
                yield waiting.popleft()
    except TunesmithError:
        yield from waiting
        raise
    yield from waiting


def num_processes(data: Data, num_bytes: int) -> int:
    """The number of processes that encode files of `num_bytes`: data.num_proc, or as many as this size is
    worth."""
    return data.num_proc or (min(num_cpus(), MOST_PROCESSES) if num_bytes >= WORTH_BYTES else 1)


def encode_chunks(
    found: Iterator[tuple[int, Example]], renderer: Renderer, facts: Sequence[FileFacts], num_proc: int
) -> Iterator[tuple[Chunk, Encoded, int]]:
    """Each chunk of examples, its rows, and the bytes of the files of `facts` that were read until its end.

    Raises as `found` does, after the chunks before, and as `Renderer.encode`.
    """
    with _processes(renderer, num_proc) as begin:
        sent = ((chunk, begin(chunk), sum(file.done_bytes for file in facts)) for chunk in chunks(found))
        for chunk, rows_of_chunk, done_bytes in _ahead(sent, AHEAD * num_proc if num_proc > 1 else 0):
            yield chunk, rows_of_chunk(), done_bytes


def relabelled(rows: pa.RecordBatch, names: Sequence[str], vocabulary: dict[str, int]) -> pa.RecordBatch:
    """Rows whose labels count by `names`, with labels by `vocabulary`, to which new classes are added."""
    ids = np.array([vocabulary.setdefault(name, len(vocabulary)) for name in names] or [0], np.int64)
    at = SCHEMA.get_field_index("labels")
    labels = rows.column(at)
    local = labels.values.to_numpy()
    values = np.where(local < 0, local, ids[np.maximum(local, 0)])
    return rows.set_column(at, SCHEMA.field(at), pa.ListArray.from_arrays(labels.offsets, pa.array(values)))


def complete(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Rows as an earlier version wrote them, with empty lists in the columns that it did not have."""
    for column in SCHEMA:
        if column.name not in rows.schema.names:
            offsets = pa.array(np.zeros(rows.num_rows + 1, np.int32))
            empty = pa.ListArray.from_arrays(offsets, pa.array([], column.type.value_type))
            rows = rows.append_column(column, empty)
    return rows


def columns(found: Sequence[tuple[Row, int, int, int]]) -> pa.RecordBatch:
    """Rows as they are stored: each with its file, and the hashes of its example's content and input."""

    def numbers(values: Iterable[int], dtype: Any) -> pa.Array:
        return pa.array(np.fromiter(values, dtype, len(found)))

    rows, files, contents, inputs = zip(*found, strict=True) if found else ((), (), (), ())
    ids, trained = _lists([row.ids for row in rows], np.int32), _lists([row.trained for row in rows], np.bool_)
    num_trained = np.concatenate([[0], np.cumsum(trained.values.to_numpy(zero_copy_only=False))])
    arrays = [
        ids,
        trained,
        numbers((line_tokens(row) for row in rows), np.int32),
        pa.array(np.diff(num_trained[trained.offsets.to_numpy()]).astype(np.int32)),
        numbers(files, np.int32),
        numbers((row.source.line for row in rows), np.int64),
        numbers(contents, np.uint64),
        numbers(inputs, np.uint64),
        _lists([() if row.labels is None else row.labels for row in rows], np.int64),
        numbers((row.second for row in rows), np.int32),
        numbers((row.num_bytes for row in rows), np.int32),
        _lists([row.branches for row in rows], np.int32),
        _lists([row.values for row in rows], np.float64),
        _lists([row.keys for row in rows], np.int64),
        _lists([row.images for row in rows], np.uint64),
    ]
    return pa.record_batch(arrays, schema=SCHEMA)


def _lists(lists: Sequence[Sequence[float] | NDArray[Any]], dtype: Any) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int32)
    values = np.concatenate(
        [np.empty(0, dtype), *(np.asarray(values_of_row, dtype) for values_of_row in lists if len(values_of_row))]
    )
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


@dataclass(kw_only=True)
class Encoding:
    """The rows of `files` as record batches, in memory bounded by chunks of examples and a batch of rows.

    The rows are the same by any number of processes. Counts are complete when all batches were taken.
    """

    data: Data
    files: Sequence[DataFile]
    renderer: Renderer
    num_bytes: int
    """Size of all files."""
    on_problem: OnProblem
    progress: OnProgress
    num_rows: int = 0
    skipped: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    vocabulary: dict[str, int] = field(default_factory=dict)
    """Classes by their first appearance, which rows count by until it is known what a model learns."""
    many: bool | None = None
    """Whether classes came as lists; None: rows without classes."""
    on_images: Callable[[Iterable[ImageRef]], None] = lambda images: None
    """Gets the images of rows, before the batch that has the rows."""
    _last_bad: Source | None = None

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises `DataError` for a file that cannot be read, when the rows before it were taken."""
        parts: list[pa.RecordBatch] = []
        num_rows = num_tokens = 0
        facts: list[FileFacts] = []
        read = examples(self.files, self.data, self._hear, facts=facts, task=self.renderer.task_name)
        num_proc = num_processes(self.data, self.num_bytes)
        for _, encoded, done_bytes in encode_chunks(read, self.renderer, facts, num_proc):
            rows, names, many, problems, images = encoded
            for problem in problems:
                self._hear(problem)
            self.on_images(images)
            parts.append(relabelled(rows, names, self.vocabulary))
            num_rows += rows.num_rows
            num_tokens += len(rows.column("ids").values)
            self.num_rows += rows.num_rows
            if many is not None:
                self.many = bool(self.many) or many
            if num_rows >= BATCH_ROWS or num_tokens >= BATCH_TOKENS:
                yield pa.concat_batches(parts)
                parts, num_rows, num_tokens = [], 0, 0
            self.progress(self.num_rows, done_bytes, self.num_bytes)
        if num_rows:
            yield pa.concat_batches(parts)
        self.progress(self.num_rows, self.num_bytes, self.num_bytes)

    def _hear(self, problem: Problem) -> None:
        counts = self.errors if problem.severity == "error" else self.warnings
        counts[problem.code] += 1
        if problem.severity == "error" and problem.source != self._last_bad:
            self.skipped += 1  # the problems of one row come one after the other
            self._last_bad = problem.source
        self._list(problem)

    def _list(self, problem: Problem) -> None:
        if len(self.problems) < self.data.limits.problems:
            self.problems.append(problem)
            self.on_problem(problem)


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


@dataclass(kw_only=True)
class JoinedParts(Encoding):
    """The rows of files that are here only while they are read, in parts, one after the other.

    Each part is a row store of its own, so that an interrupted encoding continues with the first missing one.
    """

    build: Callable[..., Any]
    """`dataset.build` of `files`, with `on_problem` and `progress`, into the folder of parts."""

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises as `dataset.build`, and DataError after the first part with rows that refuse the data."""
        first_file, done_bytes = 0, 0
        for part in in_parts(self.files):

            def progress(
                rows: int, done: int, of: int, before: int = done_bytes, num_rows: int = self.num_rows
            ) -> None:
                self.progress(num_rows + rows, before + done, self.num_bytes)

            store = self.build(files=part, on_problem=self._list, progress=progress)
            summary = store.summary
            self.num_rows += summary.num_rows
            self.skipped += summary.skipped
            self.errors.update(summary.errors)
            self.warnings.update(summary.warnings)
            if summary.many is not None:
                self.many = bool(self.many) or summary.many
            if num_bad := num_refused(self.data, self.errors):  # the others may take days
                what = f"{plural(num_bad, 'problem')} in the rows of the first {plural(first_file + len(part), 'file')}"
                way = f"Correct the data, or leave such rows out: {SKIP}."
                found = refused(self.data, self.problems)
                raise DataError(f"{what}; the others were not read. {way}", found, ways=[SKIPPING])
            self.on_images(store.images or ())
            at = SCHEMA.get_field_index("file")
            for batch in store.batches():
                files = (batch.column(at).to_numpy() + np.int32(first_file)).astype(np.int32)
                numbered = batch.set_column(at, SCHEMA.field(at), pa.array(files))
                yield relabelled(numbered, store.labels.vocabulary, self.vocabulary)
            first_file += len(part)
            done_bytes += sum(size_of(file.at) for file in part)
