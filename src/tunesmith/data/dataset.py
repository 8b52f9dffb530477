"""Encoded rows on disk: written once, memory-mapped ever after.

    <key>.arrow         an Arrow IPC file: ids, trained flags, where each row came from
    <key>.images.arrow  of rows with images, see `image_store`
    <key>.json          its summary, written last: without it there is no store

The key is a hash of everything the rows follow from, so an equal key means equal rows and nothing is encoded
twice. A killed build leaves only a `.tmp-` file.
"""

# I rows, T tokens, N targets, V words of the vocabulary

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.addresses import is_address, known
from tunesmith.data.branches import BranchColumns, ListColumn
from tunesmith.data.detect_format import suffix_of
from tunesmith.data.encode import SCHEMA, Encoding, JoinedParts, OnProgress, complete, in_parts
from tunesmith.data.image_store import ImageTable, ImageWriter
from tunesmith.data.labels import LabelCounts, targets
from tunesmith.data.read import OnProblem, expand_folders, inspect_files
from tunesmith.data.renderer import Renderer
from tunesmith.data.row_targets import RowTargets
from tunesmith.data.tokenizer import serialized
from tunesmith.errors import DataError, WayOut
from tunesmith.recipe.schema import AS_IT_IS, Data, DataFile
from tunesmith.runs import atomic as disk
from tunesmith.types import IGNORE, JsonObject, Labels, Layout, Problem, Row, Source

VERSION = 5
"""Version of the file format, of encoding and of the key: raise it with any change that gives other rows for
equal data. 5: the whole tokenizer is in the key, and texts that become vectors have keys of their own."""
READABLE = (4, VERSION)
"""Versions whose rows a finished run may have kept."""
STALE_S = 3600.0
"""Age at which another build's temporary file counts as left over from a process that died."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The .json file: facts about the .arrow file."""

    version: int
    key: str
    num_rows: int
    skipped: int
    """Rows read that are not in the store."""
    errors: dict[str, int]
    """Problems by code, of rows that are not in the store."""
    warnings: dict[str, int]
    """Problems by code, of rows that are."""
    problems: list[JsonObject]
    """The first `data.limits.problems` of both kinds. A source is the number of its file, and a line."""
    labels: list[str]
    """Classes by first appearance."""
    many: bool | None
    """Whether classes came as lists; None: rows without classes."""
    data_sha256: list[str]
    """Hash of each data file."""
    arrow_sha256: str
    arrow_bytes: int
    images: str = ""
    """`ImageWriter.digest` of the images of its rows."""


class LabelColumn:
    """The column `labels` of a table of rows. A row without an answer holds `IGNORE`."""

    def __init__(self, table: pa.Table, vocabulary: Sequence[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self._offsets, self._ids = list_column(table, "labels")

    def at(self, row: int) -> NDArray[np.int64]:
        """Ids of one row, in the order of its targets."""
        ids_N: NDArray[np.int64] = self._ids[self._offsets[row] : self._offsets[row + 1]]
        return ids_N

    def firsts(self) -> NDArray[np.int64]:
        """[I], the first id of each row; -1: it has none."""
        first_I = np.append(self._ids, -1)[self._offsets[:-1]]
        return np.where(np.diff(self._offsets) > 0, np.maximum(first_I, -1), -1)

    def counts(self, times_I: NDArray[np.int64]) -> NDArray[np.int64]:
        """[V], how often each id occurs in the rows, row i counted `times_I[i]` times."""
        times_N = times_I[self._rows]
        is_known_N = self._ids >= 0
        found_V = np.bincount(self._ids[is_known_N], times_N[is_known_N], minlength=len(self.vocabulary))
        return found_V.astype(np.int64)  # whole numbers far below 2**53: nothing is rounded

    def label_counts(self, times_I: NDArray[np.int64], *, many: bool, source: Callable[[int], Source]) -> LabelCounts:
        """The labels of rows, row i counted `times_I[i]` times; `source` returns the place of a row."""
        return LabelCounts(
            self.vocabulary, self.counts(times_I), many, lambda label: source(self.first_row(label, times_I))
        )

    def first_row(self, label: int, times_I: NDArray[np.int64]) -> int:
        """The first row with an id, among those with `times_I` above 0. Raises IndexError if none has it."""
        return int(self._rows[(self._ids == label) & (times_I[self._rows] > 0)][0])

    def targets_at(self, row: int, labels: Labels) -> NDArray[np.generic]:
        """Targets of one row."""
        ids_N = self.at(row)
        return ids_N if IGNORE in ids_N else targets(labels, ids_N, self.vocabulary)

    def denominators(self, labels: Labels) -> NDArray[np.float64]:
        """[I], the share of each row in the denominator of the loss."""
        if labels.kind == "many":
            return np.full(len(self._offsets) - 1, float(labels.num_outputs))
        weights_V = np.ones(len(self.vocabulary))
        if labels.weights_C is not None:
            classes_V = targets(replace(labels, kind="tags"), np.arange(len(self.vocabulary)), self.vocabulary)
            weights_V = labels.weights_C[classes_V.astype(np.int64)]
        weights_N = np.append(weights_V, 0.0)[np.maximum(self._ids, -1)]
        return np.bincount(self._rows, weights_N, minlength=len(self._offsets) - 1).astype(np.float64)

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """[N], the row of each id."""
        return np.repeat(np.arange(len(self._offsets) - 1), np.diff(self._offsets))


class RowStore:
    """The rows of one set of files, in file order, memory-mapped. Select rows by arrays of their indices."""

    def __init__(self, folder: Path, summary: Summary, paths: Sequence[str], *, reused: bool) -> None:
        self.summary = summary
        self.key = summary.key
        self.skipped = summary.skipped
        self.reused = reused
        """Whether the rows had been encoded before."""
        self.paths = tuple(paths)
        self.folder = folder
        table = pa.Table.from_batches(self.batches(), SCHEMA)
        self._ids, self._trained = table["ids"], table["trained"]
        self.lengths: NDArray[np.int32] = table["length"].to_numpy()
        """Tokens of each row, with all lines of a row that has branches."""
        self.targets: NDArray[np.int32] = table["targets"].to_numpy()
        """Trained tokens of each row."""
        self.file_index: NDArray[np.int32] = table["file"].to_numpy()
        self.lines: NDArray[np.int64] = table["line"].to_numpy()
        self.hashes: NDArray[np.uint64] = table["hash"].to_numpy()
        self.inputs: NDArray[np.uint64] = table["input"].to_numpy()
        """`examples.input_hash` of each row."""
        self._second: NDArray[np.int32] = table["second"].to_numpy()
        self.num_bytes: NDArray[np.int32] = table["bytes"].to_numpy()
        self._images = list_column(table, "images")
        self.images = ImageTable(images_path(folder, self.key)) if summary.images else None
        """The images of its rows; None: they have none."""
        self.branches = BranchColumns(*(list_column(table, name) for name in ("branches", "values", "keys")))
        self.denominators: NDArray[np.float64] = self.targets.astype(np.float64)
        """The share of each row in the denominator of the loss."""
        if self.branches.has_any:
            self.denominators = np.ones(len(self))
        self.labels = LabelColumn(table, summary.labels)
        """Classes of the rows, by the store's own ids."""
        self.learnt = RowTargets()
        """Targets besides the tokens, as `row_targets` wrote them."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def data_hashes(self) -> dict[str, str]:
        """SHA-256 of each data file, by its path."""
        return dict(zip(self.paths, self.summary.data_sha256, strict=True))

    def source(self, index: int) -> Source:
        """The file and line of a row."""
        return Source(self.paths[self.file_index[index]], int(self.lines[index]))

    def row(self, index: int) -> Row:
        """One row; its ids are a read-only view of the file. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a store of {len(self)}")
        labels: NDArray[np.generic] | None = None
        if self.summary.many is not None:
            learnt = self.learnt.labels
            labels = self.labels.at(index) if learnt is None else self.labels.targets_at(index, learnt)
        return Row(
            self._ids[index].values.to_numpy(),
            self._trained[index].values.to_numpy(zero_copy_only=False),
            self.source(index),
            labels=labels,
            second=int(self._second[index]),
            num_bytes=int(self.num_bytes[index]),
            branches=self.branches.sizes(index),
            values=self.branches.values(index),
            keys=self.branches.keys(index),
            images=self.images_at(index),
            values_NC=None if self.learnt.teacher is None else self.learnt.teacher.values(index),
        )

    def images_at(self, index: int) -> tuple[int, ...]:
        """The numbers of the images of one row."""
        offsets, numbers = self._images
        return tuple(numbers[offsets[index] : offsets[index + 1]].tolist())

    def lengths_in(self, layout: Layout) -> NDArray[np.int32]:
        """[I], places of each row in a micro-batch: padded lines of a row are as long as its longest."""
        padded = layout == "padded" and self.branches.has_any
        return self.branches.padded_lengths(self.lengths) if padded else self.lengths

    def count_labels(self, rows_I: NDArray[np.int64] | None = None) -> LabelCounts:
        """The labels of some rows, or of all."""
        times_I = np.ones(len(self), np.int64) if rows_I is None else np.bincount(rows_I, minlength=len(self))
        return self.labels.label_counts(times_I, many=bool(self.summary.many), source=self.source)

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Ids that occur in any row, ascending, each once."""
        chunks = [chunk.values.to_numpy() for chunk in self._ids.chunks]
        seen_V = np.zeros(1 + max((int(ids.max()) for ids in chunks if len(ids)), default=0), np.bool_)
        for ids in chunks:  # flags, where sorting tens of millions of tokens would take seconds
            seen_V[ids] = True
        return np.flatnonzero(seen_V)

    @cached_property
    def windows(self) -> NDArray[np.int64]:
        """[I], the number of each row within its example, from 0."""
        is_first_I = np.ones(len(self), np.bool_)
        is_first_I[1:] = (np.diff(self.file_index) != 0) | (np.diff(self.lines) != 0)
        places_I = np.arange(len(self))
        return places_I - np.maximum.accumulate(np.where(is_first_I, places_I, 0))

    def learn(self, targets: RowTargets) -> None:
        """Let rows hold these targets. Only `row_targets` calls it."""
        self.learnt = targets
        if targets.masked is not None:
            self.denominators = np.maximum(1.0, np.round(targets.masked * self.targets))
        elif targets.labels is not None and not self.branches.has_any:
            self.denominators = self.labels.denominators(targets.labels)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows as they are on disk; columns that an earlier version did not write are empty."""
        reader = pa.ipc.open_file(pa.memory_map(str(arrow_path(self.folder, self.key))))
        return (complete(reader.get_batch(i)) for i in range(reader.num_record_batches))

    def keep(self, folder: Path) -> None:
        """Put the store into another folder too, by hard link where the disk allows, where `build` finds it.

        Raises `StorageError`.
        """
        with disk.storing(folder, num_bytes=self.summary.arrow_bytes):
            folder.mkdir(parents=True, exist_ok=True)
            for path in _paths(self.folder, self.key):
                target = folder / path.name
                if path.exists() and not target.exists():
                    disk.link_or_copy(path, target)
            disk.fsync_dir(folder)

    def discard(self) -> None:
        """Remove what `build` wrote for this store, since the data is refused; rows found there before stay."""
        if self.reused:
            return
        with disk.storing(self.folder):
            for path in reversed(_paths(self.folder, self.key)):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: it holds rows of others
                self.folder.rmdir()


def build(
    folder: Path,
    *,
    data: Data,
    files: Sequence[DataFile],
    renderer: Renderer,
    on_problem: OnProblem,
    progress: OnProgress = lambda rows, done, total: None,
) -> RowStore:
    """The encoded rows of `files`: found in `folder` if they were encoded before, else encoded and put there.

    A folder among `files` is replaced by the documents in it; `store.paths` names those. `on_problem` receives
    the first `data.limits.problems` problems, also where the rows were found; `summary` counts all of them. Bad
    rows are left out and counted, whatever `data.bad_rows` says: the caller refuses. Raises `DataError` for a
    file that is missing, unreadable or changes meanwhile; `StorageError`.
    """
    files = expand_folders(files, on_problem, how=data.reading)
    inspect_files(files, lambda warning: None, data.reading)  # names all unreadable ones before one is hashed
    with ExitStack() as held:
        before = [_signature(file.at) for file in files]
        sizes = [size for size, *_ in before]
        hashes = [file_hash(file) for file in files]
        suffixes = [suffix_of(file.path) for file in files]  # which choose a reader
        key = _key(hashes, suffixes, data, renderer, [_image_folder(file, data) for file in files])
        paths = [file.path for file in files]
        summary = find(folder, key)
        if summary is not None and summary.images and not ImageTable(images_path(folder, key)).is_current():
            summary = None  # its images are not as they were
        if summary is None:
            with disk.storing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            if any(is_address(file.at) for file in files):  # one process downloads, others wait for its rows
                held.enter_context(filelock.FileLock(folder / f"{key[:16]}.lock"))
                summary = find(folder, key)
        if summary is not None:
            for problem in summary.problems:
                file, line = problem["source"]  # earlier versions wrote the path
                source = Source(paths[file] if isinstance(file, int) else file, line)
                ways = tuple(WayOut(**way) for way in problem.get("ways", ()))
                on_problem(Problem(**{**problem, "source": source, "ways": ways}))
            progress(summary.num_rows, sum(sizes), sum(sizes))
            return RowStore(folder, summary, paths, reused=True)
        disk.clean(folder, older_than_s=STALE_S)
        aside = folder / f"parts-{key[:16]}"
        shared: dict[str, Any] = {"data": data, "renderer": renderer, "on_problem": on_problem, "progress": progress}
        encoding = Encoding(files=files, num_bytes=sum(sizes), **shared)
        if len(in_parts(files)) > 1:
            of_part = partial(build, aside, data=data, renderer=renderer)
            encoding = JoinedParts(files=files, num_bytes=sum(sizes), build=of_part, **shared)
        check = partial(_check_unchanged, files, before)
        summary = write(arrow_path(folder, key), key, paths, hashes, encoding, check=check)
        disk.write_atomic(json_path(folder, key), orjson.dumps(asdict(summary)))
        disk.remove(aside)
        return RowStore(folder, summary, paths, reused=False)


def write(
    path: Path, key: str, paths: list[str], hashes: list[str], encoding: Encoding, *, check: Callable[[], None]
) -> Summary:
    """The summary of the file at `path`, which appears there complete, and only if `check` does not raise.

    `paths`, `hashes`: of the data files.
    """
    numbers = {path_of_file: number for number, path_of_file in enumerate(paths)}
    with disk.writing(path) as file, ImageWriter(images_path(path.parent, key)) as images:
        encoding.on_images = images.add
        batches = encoding.batches()
        threshold = gc.get_threshold()
        gc.set_threshold(100_000)  # rows hold no circles; a program's frozen objects stay so
        try:
            with closing(batches), pa.ipc.new_file(pa.PythonFile(file, "w"), SCHEMA) as sink:
                for batch in batches:
                    sink.write_batch(batch)
        finally:
            gc.set_threshold(*threshold)
        check()
    return Summary(
        version=VERSION,
        key=key,
        num_rows=encoding.num_rows,
        skipped=encoding.skipped,
        errors=dict(encoding.errors),
        warnings=dict(encoding.warnings),
        problems=[_stored(problem, numbers) for problem in encoding.problems],
        labels=list(encoding.vocabulary),
        many=encoding.many,
        data_sha256=hashes,
        arrow_sha256=disk.sha256_file(path),
        arrow_bytes=path.stat().st_size,
        images=images.digest,
    )


def _stored(problem: Problem, numbers: Mapping[str, int]) -> JsonObject:
    """A problem with its file by number; without ways out where it has none, as earlier versions read it."""
    source = problem.source
    values = {**asdict(problem), "source": [numbers.get(source.path, source.path), source.line]}
    return values if problem.ways else {key: value for key, value in values.items() if key != "ways"}


def find(folder: Path, key: str, versions: Collection[int] = (VERSION,)) -> Summary | None:
    """The summary of a store that is there and whole."""
    try:
        summary = Summary(**orjson.loads(json_path(folder, key).read_bytes()))
        arrow = arrow_path(folder, key)
        if summary.version not in versions or summary.key != key or arrow.stat().st_size != summary.arrow_bytes:
            return None
        if summary.images and not images_path(folder, key).is_file():
            return None
        return summary if disk.sha256_file(arrow) == summary.arrow_sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def arrow_path(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.arrow"


def json_path(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.json"


def images_path(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.images.arrow"


def _paths(folder: Path, key: str) -> list[Path]:
    """The files of a store, its summary last; the one of images is not always there."""
    return [images_path(folder, key), arrow_path(folder, key), json_path(folder, key)]


def open_kept(folder: Path, key: str | None) -> RowStore | None:
    """Rows that `RowStore.keep` put into a folder, each file named by its hash; None if they cannot be read.

    `key`: of the rows that are meant, as the run's identity names them; None: the run is older than that name.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        keys = [orjson.loads(path.read_bytes())["key"] for path in sorted(folder.glob("*.json"))]
        for candidate in keys if key is None else [key]:
            summary = find(folder, candidate, READABLE)
            if summary is not None:
                return RowStore(folder, summary, summary.data_sha256, reused=True)
    return None


def _image_folder(file: DataFile, data: Data) -> str:
    """The folder where paths of a file's rows begin: a copy of the file in another folder names other
    images."""
    if data.image_folder is None and is_address(file.path):
        return ""
    return str(Path(data.image_folder or Path(file.path).parent).resolve())


def _key(hashes: Sequence[str], formats: Sequence[str], data: Data, renderer: Renderer, at: Sequence[str] = ()) -> str:
    """`at`: where paths of images begin, for each file."""
    limits = data.limits.model_dump()
    limits.pop("problems")  # how many are listed changes no row
    of_images = {name: limits.pop(name) for name in ("images", "image_bytes", "image_pixels")}
    parts: JsonObject = {
        "version": VERSION,
        "data": list(hashes),
        "formats": list(formats),
        "columns": data.columns,
        "limits": limits,
        "tokenizer and template": renderer.fingerprint,
        "tokenizer": hashlib.sha256(serialized(renderer.tokenizer).encode()).hexdigest(),
        "task": renderer.task_name,
    }
    if data.reading != AS_IT_IS:
        parts["reading"] = [*data.reading]
    for name in ("kind", "stride", "prompt", "max_tokens", "too_long", "control_tokens"):
        parts[name] = getattr(renderer, name)
    if renderer.pooling is not None:
        pooling = asdict(renderer.pooling)
        parts["pooling"] = {key: value for key, value in pooling.items() if key != "include_prompt" or not value}
    if renderer.date is not None:
        parts["date"] = renderer.date
    if renderer.placeholders is not None:  # a model that reads text alone has rows without images
        parts["images"] = {**of_images, "folders": list(at), "processor": renderer.placeholders.fingerprint}
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _signature(path: str) -> tuple[int, int, int, int]:
    """Size, inode and both times of a file: they change when it is written to or replaced."""
    if is_address(path):
        return known(path).num_bytes, 0, 0, 0
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Check the path.") from error
    return stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns


def file_hash(file: DataFile) -> str:
    """SHA-256 of a file, or the version of one at an address. Raises DataError."""
    try:
        return known(file.path).version if is_address(file.path) else disk.sha256_file(Path(file.at))
    except OSError as error:
        raise DataError(f"{file.at}: cannot be read: {error.strerror}. Check the path and its permissions.") from error


def _check_unchanged(files: Sequence[DataFile], before: Sequence[tuple[int, int, int, int]]) -> None:
    for file, signature in zip(files, before, strict=True):
        if _signature(file.at) != signature:
            raise DataError(f"{file.path}: it changed while it was read. Start again when nothing writes to it.")


def list_column(table: pa.Table, name: str) -> ListColumn:
    """Offsets of the lists of a column in its values, with the end of the last, and these values."""
    column = table[name].combine_chunks()
    return column.offsets.to_numpy(), column.values.to_numpy()
