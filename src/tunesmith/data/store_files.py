"""The two files of a store: written whole or not at all, and found only when whole."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from tunesmith.data.chunks import SCHEMA
from tunesmith.data.collecting import collected_between
from tunesmith.data.encoding import Encoding
from tunesmith.runs import atomic as disk
from tunesmith.types import Problem, Source

VERSION = 4
"""Of the file format and of the code that makes rows: raise it with any change that gives other rows for equal data."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What the .json file says about the .arrow file."""

    version: int
    key: str
    num_rows: int
    skipped: int
    """Rows read that are not in the store."""
    errors: dict[str, int]
    """Problems by code, of rows that are not in the store."""
    warnings: dict[str, int]
    """Problems by code, of rows that are."""
    problems: list[dict[str, Any]]
    """The first `data.limits.problems` of both kinds."""
    labels: list[str]
    """Classes by first appearance."""
    many: bool | None
    """Whether classes came as lists; None: rows without classes."""
    data_sha256: list[str]
    """Of each data file."""
    arrow_sha256: str
    arrow_bytes: int


def write(path: Path, key: str, hashes: list[str], encoding: Encoding, *, check: Callable[[], None]) -> Summary:
    """The summary of the file at `path`, which appears there complete, and only if `check` does not raise."""
    with disk.writing(path) as file:
        hashing = _Hashing(file)
        batches = encoding.batches()
        sink = pa.ipc.new_file(pa.PythonFile(hashing, "w"), SCHEMA)
        with closing(batches), sink, collected_between() as collect:
            for batch in batches:
                sink.write_batch(batch)
                collect()
        check()
    return Summary(
        version=VERSION,
        key=key,
        num_rows=encoding.num_rows,
        skipped=encoding.skipped,
        errors=dict(encoding.errors),
        warnings=dict(encoding.warnings),
        problems=[_as_json(problem) for problem in encoding.problems],
        labels=list(encoding.vocabulary),
        many=encoding.many,
        data_sha256=hashes,
        arrow_sha256=hashing.digest.hexdigest(),
        arrow_bytes=hashing.num_bytes,
    )


class _Hashing:
    """A file to write to that knows the SHA-256 of what was written."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.num_bytes += len(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Left to the owner of the file."""


def find(folder: Path, key: str) -> Summary | None:
    """The summary of a store that is there and whole."""
    try:
        summary = Summary(**orjson.loads(json_path(folder, key).read_bytes()))
        arrow = arrow_path(folder, key)
        if summary.version != VERSION or summary.key != key or arrow.stat().st_size != summary.arrow_bytes:
            return None
        return summary if disk.sha256_file(arrow) == summary.arrow_sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def _as_json(problem: Problem) -> dict[str, Any]:
    return {**asdict(problem), "source": [problem.source.path, problem.source.line]}


def as_problem(saved: dict[str, Any]) -> Problem:
    return Problem(**{**saved, "source": Source(*saved["source"])})


def arrow_path(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.arrow"


def json_path(folder: Path, key: str) -> Path:
    return folder / f"{key[:16]}.json"
