"""A file of answers that grows by whole lines, and can be gone on with by a later call.

FILE                 a line for each row so far
FILE.progress.json   what it is made from; once it is complete also the SHA-256 of it, so that the same command again
                     finds nothing to do
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from tunesmith.errors import InputError, StorageError
from tunesmith.runs import atomic as files

COMPLETE = "complete: its SHA-256"


class Output:
    """An open file of answers. `num_lines` of them stood there before, `num_errors` of these without an answer."""

    def __init__(
        self,
        path: Path,
        file: BinaryIO,
        identity: Mapping[str, str],
        *,
        kept: Sequence[str] = (),
        is_complete: bool = False,
    ) -> None:
        self.path = path
        self._unanswered = {"source", "error", "reference", *kept}
        self.is_complete = is_complete
        self._file = file
        self._identity = identity
        self.num_lines, self.num_errors = 0, 0
        self.last_source = ""
        self._read_lines()

    @classmethod
    def open(
        cls, path: Path, identity: Mapping[str, str], *, kept: Sequence[str] = (), overwrite: bool = False
    ) -> Output:
        """The file to go on with, its half last line dropped, or a new one.

        `identity` is what the answers follow from, by name. Raises InputError where the file that is there follows
        from something else, or does not say from what; StorageError. `kept`: columns that lines without an answer
        have too.
        """
        progress = _progress(path)
        with files.storing(path):
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 (it is closed by `close`)
        try:
            _be_alone(file, path)
            with files.storing(path):
                files.clean(path.parent, name=progress.name)
                if overwrite:
                    file.truncate(0)  # first: the progress file of an empty one says nothing
                is_begun = os.fstat(file.fileno()).st_size > 0
                if is_begun and not progress.exists():
                    raise InputError(
                        f"{path}: is there already, and nothing says what it was made from. Choose another --out, or "
                        "write over it with --overwrite."
                    )
                if not is_begun:
                    files.write_atomic(progress, files.to_json(identity, indent=True) + b"\n")
                    return cls(path, file, identity, kept=kept)
                then = files.from_json(progress.read_bytes())
                whole = then.pop(COMPLETE, None)
                _refuse_changes(path, identity, then)
                if whole is not None and files.sha256_file(path) != whole:
                    raise InputError(
                        f"{path}: was changed since it was complete. Choose another --out, or write over it with "
                        "--overwrite."
                    )
                return cls(path, file, identity, kept=kept, is_complete=whole is not None)
        except BaseException:
            file.close()
            raise

    def _read_lines(self) -> None:
        """Count the lines that are there, and drop what a killed writer left behind the last line end."""
        self._file.seek(0)
        end = 0
        for line in _lines(self._file):
            end += len(line)
            self.num_lines += 1
            value = orjson.loads(line)
            self.num_errors += "error" in value and "source" in value and value.keys() <= self._unanswered
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
        """All rows are answered: nothing is left to go on with, and the same command again is told so."""
        with files.storing(self.path):
            facts = {**self._identity, COMPLETE: files.sha256_file(self.path)}
            files.write_atomic(_progress(self.path), files.to_json(facts, indent=True) + b"\n")
        self.close()

    def close(self) -> None:
        """Leave the file as it is, to be gone on with."""
        self._file.close()


def _be_alone(file: BinaryIO, path: Path) -> None:
    """Raise InputError where another process writes the file: the lines of both would be mixed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it. Wait for it, or choose another --out.") from None
    except OSError:  # a file system without locks
        return


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
