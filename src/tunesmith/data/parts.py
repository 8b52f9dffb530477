"""Encoding of files that are not on this machine: a few at a time are downloaded, encoded and removed.

Each part is a row store of its own in a folder next to the whole one, so that an interrupted encoding continues with
the first part that is not there. At the end the parts are put together and removed.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import filelock
import numpy as np
import pyarrow as pa

from tunesmith.data.encode import (
    SCHEMA,
    Encoded,
    Encoding,
    EncodingCounts,
    OnProblem,
    OnProgress,
    joined,
    num_processes,
)
from tunesmith.data.problems import SKIP, num_refused, refused
from tunesmith.data.remote import PART_BYTES, is_address, local
from tunesmith.data.renderer import Renderer
from tunesmith.errors import DataError
from tunesmith.phrases import plural
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.runs.atomic import storing

if TYPE_CHECKING:
    from tunesmith.data.dataset import RowStore


class Build(Protocol):
    """`dataset.build` of some of the files; what it reports is of the whole."""

    def __call__(self, files: Sequence[DataFile], on_problem: OnProblem, progress: OnProgress) -> RowStore: ...


@contextmanager
def one_at_a_time(folder: Path, files: Sequence[DataFile]) -> Iterator[None]:
    """Wait until no other process downloads files into `folder`; for local files nobody waits."""
    if not any(is_address(file.at) for file in files):
        yield
        return
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "parts.lock"):
        yield


def encoding_of(
    files: Sequence[DataFile],
    sizes: Sequence[int],
    aside: Path,
    held: ExitStack,
    *,
    data: Data,
    renderer: Renderer,
    on_problem: OnProblem,
    progress: OnProgress,
    build: Build,
) -> EncodingCounts:
    """The rows of the files; those not on this machine are downloaded into `aside` and removed when `held` ends.

    Raises DataError, StorageError.
    """
    parts, total = in_parts(files, sizes), sum(sizes)
    if len(parts) > 1:
        return JoinedParts(parts, build, total=total, on_problem=on_problem, progress=progress, data=data)
    arrived, is_remote = 0, any(is_address(file.at) for file in files)

    def on_bytes(num: int) -> None:
        nonlocal arrived
        arrived = min(arrived + num, total)
        progress(0, arrived // 2, total)

    def on_rows(rows: int, done: int, of: int) -> None:
        progress(rows, (total + done) // 2 if is_remote else done, of)

    there = [held.enter_context(local(file, aside / f"{i}", on_bytes)) for i, file in enumerate(files)]
    num_proc = num_processes(data.num_proc, num_bytes=total)
    return Encoding(data, there, renderer, num_bytes=total, on_problem=on_problem, progress=on_rows, num_proc=num_proc)


def in_parts(files: Sequence[DataFile], sizes: Sequence[int]) -> list[list[tuple[DataFile, int]]]:
    """Files and their sizes in parts of PART_BYTES, in their order; all in one if they are on this machine."""
    if not any(is_address(file.at) for file in files):
        return [list(zip(files, sizes, strict=True))]
    parts: list[list[tuple[DataFile, int]]] = [[]]
    for file, size in zip(files, sizes, strict=True):
        if sum(num for _, num in parts[-1]) >= PART_BYTES:
            parts.append([])
        parts[-1].append((file, size))
    return parts


class JoinedParts(EncodingCounts):
    """The rows of parts one after the other; `data.encode.Encoding` of files that come and go."""

    def __init__(
        self,
        parts: Sequence[Sequence[tuple[DataFile, int]]],
        build: Build,
        *,
        total: int,
        on_problem: OnProblem,
        progress: OnProgress,
        data: Data,
    ) -> None:
        super().__init__(data, on_problem, progress)
        self._parts, self._total, self._build = parts, total, build

    def batches(self) -> Generator[pa.RecordBatch, None, None]:
        """Raises as `dataset.build`, and DataError after the first part with rows for which the data is refused."""
        first_file = num_bytes = 0
        for part in self._parts:
            before, num_rows = num_bytes, self.num_rows

            def progress(rows: int, done: int, of: int, before: int = before, num_rows: int = num_rows) -> None:
                self._progress(num_rows + rows, before + done, self._total)

            store = self._build([file for file, _ in part], self._list, progress)
            self._count(store)
            first_file += len(part)
            self._refuse_bad(first_file)
            for batch in store.batches():
                yield joined(
                    [Encoded(_renumbered(batch, first_file - len(part)), (), store.vocabulary, None)], self.vocabulary
                )
            num_bytes += sum(size for _, size in part)

    def _refuse_bad(self, num_files: int) -> None:
        """Raise DataError if the data will be refused for rows of the parts so far: the others may take days."""
        if num_bad := num_refused(self._data, self.errors):
            what = f"{plural(num_bad, 'problem')} in the rows of the first {plural(num_files, 'file')}"
            way = f"Correct the data, or leave such rows out: {SKIP}."
            raise DataError(f"{what}; the others were not read. {way}", refused(self._data, self.problems))

    def _count(self, store: RowStore) -> None:
        summary = store.summary
        self.num_rows += summary.num_rows
        self.skipped += summary.skipped
        self.errors.update(summary.errors)
        self.warnings.update(summary.warnings)
        self.notes = self.notes or list(store.notes)
        if summary.many is not None:
            self.many = bool(self.many) or summary.many


def _renumbered(rows: pa.RecordBatch, first_file: int) -> pa.RecordBatch:
    at = SCHEMA.get_field_index("file")
    files = rows.column(at).to_numpy() + np.int32(first_file)
    return rows.set_column(at, SCHEMA.field(at), pa.array(files.astype(np.int32)))
