"""A table of the images of encoded rows, next to their store: place, hash and size of each, never pixels.

    <key>.images.arrow   number, hash, place or bytes, size in pixels, size and time of the file

Rows hold the number of each image. A store whose files have changed since is encoded anew: new pixels under
an old name would train on old ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunesmith.errors import DataError
from tunesmith.runs import atomic as disk
from tunesmith.types import ImageRef

SCHEMA = pa.schema(
    [
        ("number", pa.uint64()),
        ("sha256", pa.string()),
        ("path", pa.string()),
        ("data", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("time", pa.int64()),
    ]
)


class ImageWriter:
    """Writes each image of some rows once; without any image there is no file."""

    def __init__(self, path: Path) -> None:
        self._path, self._stack = path, ExitStack()
        self._sink: Any = None
        self._hashes: dict[int, str] = {}

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, images: Iterable[ImageRef]) -> None:
        """Write the images that are new. Raises `DataError` for two different images with one number."""
        new: list[ImageRef] = []
        for image in images:
            known = self._hashes.get(image.number)
            if known is None:
                self._hashes[image.number] = image.sha256
                new.append(image)
            elif known != image.sha256:
                raise DataError(
                    f"{image}: its hash begins like the hash of another image, so rows cannot name both. "
                    "Save it again, in another format."
                )
        if not new:
            return
        if self._sink is None:
            file = self._stack.enter_context(disk.writing(self._path))
            self._sink = self._stack.enter_context(pa.ipc.new_file(pa.PythonFile(file, "w"), SCHEMA))
        self._sink.write_batch(pa.RecordBatch.from_pylist([_line(image) for image in new], SCHEMA))

    @property
    def digest(self) -> str:
        """SHA-256 over all images and the version of Pillow, which decodes them; "" without images."""
        if not self._hashes:
            return ""
        texts = [f"Pillow {version('pillow')}", *sorted(self._hashes.values())]
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _line(image: ImageRef) -> dict[str, Any]:
    size, time = _signature(image.path) if image.path else (len(image.data), 0)
    return {
        "number": image.number,
        "sha256": image.sha256,
        "path": image.path,
        "data": image.data,
        "width": image.width,
        "height": image.height,
        "bytes": size,
        "time": time,
    }


def _signature(path: str) -> tuple[int, int]:
    """Size and time of a file; (-1, 0) if it does not exist."""
    try:
        stat = Path(path).stat()
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns


class ImageTable:
    """The images of a store by their numbers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def _table(self) -> pa.Table:
        return pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()

    @cached_property
    def _places(self) -> dict[int, int]:
        return {number: i for i, number in enumerate(self._table["number"].to_pylist())}

    def __getitem__(self, number: int) -> ImageRef:
        """Raises KeyError."""
        (row,) = self._table.slice(self._places[number], 1).to_pylist()
        return ImageRef(row["path"], row["data"], row["sha256"], row["width"], row["height"])

    def __iter__(self) -> Iterator[ImageRef]:
        return (self[number] for number in self._places)

    def is_current(self) -> bool:
        """Whether every file is unchanged: by size and time, or else by its bytes."""
        columns = [self._table[name].to_pylist() for name in ("path", "bytes", "time", "sha256")]
        return all(
            not path or _signature(path) == (size, time) or _hash(path) == sha256
            for path, size, time, sha256 in zip(*columns, strict=True)
        )


def _hash(path: str) -> str:
    try:
        return disk.sha256_file(Path(path))
    except OSError:
        return ""
