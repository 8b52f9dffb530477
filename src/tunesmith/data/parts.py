"""Encoding of files that are not on this machine, each of which is here only while it is read.

Each part of them is a row store of its own in a folder next to the whole one, so that an interrupted encoding continues
with the first part that is not there. At the end the parts are put together and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pyarrow as pa

from tunesmith.data.addresses import is_address, size_of
from tunesmith.data.encode import SCHEMA, EncodingCounts, renamed
from tunesmith.data.problems import SKIP, num_refused, refused
from tunesmith.errors import DataError
from tunesmith.phrases import plural
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.runs.atomic import storing

if TYPE_CHECKING:
    from tunesmith.data.dataset import RowStore

PART_BYTES = 256 * 1024 * 1024
"""Least size of a part."""
Build = Callable[..., "RowStore"]
"""`dataset.build` of `files`, with `on_problem` and `progress`, into the folder of parts."""


@contextmanager
def one_at_a_time(folder: Path, files: Sequence[DataFile]) -> Iterator[None]:
    """Wait until no other process downloads files into `folder`; for local files nobody waits."""
    with ExitStack() as held:
        if any(is_address(file.at) for file in files):
            with storing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(filelock.FileLock(folder / "parts.lock"))
        yield


def in_parts(files: Sequence[DataFile]) -> list[list[DataFile]]:
    """Files in parts of at least PART_BYTES that are not on this machine, in their order; one part if all are here."""
    parts: list[list[DataFile]] = [[]]
    to_come = 0
    for file in files:
        if to_come >= PART_BYTES:
            parts.append([])
            to_come = 0
        parts[-1].append(file)
        to_come += size_of(file.at) if is_address(file.at) else 0
    return parts


class JoinedParts(EncodingCounts):
    """The rows of parts one after the other; `data.encode.Encoding` of files that come and go."""

    def __init__(self, data: Data, parts: Sequence[Sequence[DataFile]], build: Build, **listeners: Any) -> None:
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
            self._count(store)
            if num_bad := num_refused(self._data, self.errors):  # the others may take days
                what = f"{plural(num_bad, 'problem')} in the rows of the first {plural(first_file + len(part), 'file')}"
                way = f"Correct the data, or leave such rows out: {SKIP}."
                raise DataError(f"{what}; the others were not read. {way}", refused(self._data, self.problems))
            for batch in store.batches():
                yield renamed(_renumbered(batch, first_file), store.labels.vocabulary, self.vocabulary)
            first_file += len(part)
            done_bytes += sum(size_of(file.at) for file in part)

    def _count(self, store: RowStore) -> None:
        summary = store.summary
        self.num_rows += summary.num_rows
        self.skipped += summary.skipped
        self.errors.update(summary.errors)
        self.warnings.update(summary.warnings)
        if summary.many is not None:
            self.many = bool(self.many) or summary.many


def _renumbered(rows: pa.RecordBatch, first_file: int) -> pa.RecordBatch:
    at = SCHEMA.get_field_index("file")
    files = rows.column(at).to_numpy() + np.int32(first_file)
    return rows.set_column(at, SCHEMA.field(at), pa.array(files.astype(np.int32)))
