"""A file of answers that grows by whole lines, and can be gone on with by a later call.

FILE                 a line for each row so far
FILE.progress.json   while it is not complete: what it is made from
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from tunesmith import files
from tunesmith.errors import InputError, StorageError


class Output:
    """An open file of answers. `num_lines` of them stood there before, `num_errors` of these without an answer."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self.num_lines, self.num_errors = 0, 0
        self.last_source = ""
        self._read_lines()

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, str], *, overwrite: bool = False) -> Output:
        """The file to go on with, its half last line dropped, or a new one.

        `identity` is what the answers follow from, by name. Raises InputError where the file that is there follows
        from something else, or does not say from what; StorageError.
        """
        progress = _progress(path)
        with files.storing(path):
            files.clean(path.parent, name=progress.name, older_than_s=3600)
            if overwrite:
                path.unlink(missing_ok=True)  # first: a progress file alone is that of an empty file
                progress.unlink(missing_ok=True)
            if path.exists() and path.stat().st_size and not progress.exists():
                raise InputError(
                    f"{path}: is there already, complete or made by something else. Choose another --out, or write "
                    "over it with --overwrite."
                )
            if path.exists() and progress.exists():
                _refuse_changes(path, identity, files.from_json(progress.read_bytes()))
            else:
                files.write_atomic(progress, files.to_json(identity, indent=True) + b"\n")
            return cls(path, open(path, "a+b", buffering=0))

    def _read_lines(self) -> None:
        """Count the lines that are there, and drop what a killed writer left behind the last line end."""
        self._file.seek(0)
        end = 0
        for line in _lines(self._file):
            end += len(line)
            self.num_lines += 1
            value = orjson.loads(line)
            self.num_errors += "error" in value and "source" in value and len(value) == 2
            self.last_source = str(value.get("source", ""))
        self._file.truncate(end)

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines; when this returns they survive the machine. Refused by the disk, none of them is there."""
        content = memoryview(b"".join(as_bytes(line) for line in lines))
        start = self._file.seek(0, os.SEEK_END)
        try:
            with files.storing(self.path, num_bytes=len(content)):
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
        except StorageError:
            self._file.truncate(start)
            raise

    def finish(self) -> None:
        """All rows are answered: nothing is left to go on with."""
        self.close()
        with files.storing(self.path):
            _progress(self.path).unlink(missing_ok=True)
            files.fsync_dir(self.path.parent)

    def close(self) -> None:
        """Leave the file as it is, to be gone on with."""
        self._file.close()


def as_bytes(line: Mapping[str, Any]) -> bytes:
    """One line of the file, its line end included: plain JSON, in which a number that is none is null."""
    return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)


def _progress(path: Path) -> Path:
    return path.with_name(path.name + ".progress.json")


def _lines(file: BinaryIO) -> Any:
    # A buffer of its own beside the unbuffered file: read by line, it would be a system call a byte.
    with open(file.fileno(), "rb", closefd=False) as reader:
        yield from (line for line in reader if line.endswith(b"\n"))


def _refuse_changes(path: Path, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    changed = [
        f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}"
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key)
    ]
    if changed:
        raise InputError(
            f"{path}: was begun with something else: {'; '.join(changed)}. Put it back, choose another --out, or "
            "start anew with --overwrite."
        )


def _short(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 40 else f"{value[:12]}…"
