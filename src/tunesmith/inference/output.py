"""The file that `predict --out` writes: resumable by whole lines, and under its own name only when it is complete.

FILE.part            a line for each row so far
FILE                 the same, complete
FILE.progress.json   the identity of model, rows and options; of a complete file also its SHA-256, so that the same
                     command again finds nothing to do
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from tunesmith.errors import InputError, StorageError
from tunesmith.runs import atomic

COMPLETE = "complete: its SHA-256"
MOVES_OPEN_FILES = sys.platform != "win32"
"""Whether the system renames and removes files that are open."""


class OutputFile:
    """An open file of answers. `num_lines` were written before, `num_errors` of these without an answer."""

    def __init__(
        self, path: Path, identity: Mapping[str, str], *, kept: Sequence[str] = (), overwrite: bool = False
    ) -> None:
        """Open the file to continue it, without its half last line, or a new one.

        `kept` are columns that lines without an answer have too. Raises InputError where an existing file has another
        identity, or none; StorageError.
        """
        self.path, self.part = path, path.with_name(path.name + ".part")
        self._identity, self._unanswered = identity, {"source", "error", "reference", *kept}
        self.is_complete, self.num_lines, self.num_errors, self.last_source = False, 0, 0, ""
        with atomic.storing(path):
            self._file = open(self.part, "a+b", buffering=0)  # noqa: SIM115 (`close` closes it)
        try:
            _lock(self._file.fileno(), path)
        except BaseException:
            self._file.close()
            raise
        try:
            with atomic.storing(path):
                atomic.clean(path.parent, name=self._progress.name)
                if overwrite:
                    path.unlink(missing_ok=True)
                    self._file.truncate(0)
                self._check_identity()
                self._read_lines()
        except BaseException:
            self._release()
            with suppress(OSError):
                if not self.part.stat().st_size:
                    self.part.unlink()
            self._file.close()
            raise

    @property
    def _progress(self) -> Path:
        return self.path.with_name(self.path.name + ".progress.json")

    def _check_identity(self) -> None:
        exists = self.path.exists()
        if not exists and os.fstat(self._file.fileno()).st_size == 0:
            atomic.write_atomic(self._progress, atomic.to_json(self._identity, indent=True) + b"\n")
            return
        if not self._progress.exists():
            raise InputError(
                f"{self.path}: is there already, and nothing says what it was made from. Choose another --out, or "
                "write over it with --overwrite."
            )
        then = atomic.from_json(self._progress.read_bytes())
        whole = then.pop(COMPLETE, None)
        _refuse_changes(self.path, self._identity, then)
        if exists and atomic.sha256_file(self.path) != whole:
            raise InputError(
                f"{self.path}: is not the file that was complete. Choose another --out, or write over it with "
                "--overwrite."
            )
        self.is_complete = exists

    def _read_lines(self) -> None:
        """Count the lines, and drop what a killed process left behind the last line end."""
        end = 0
        with open(self.path if self.is_complete else self.part, "rb") as reader:
            for line in reader:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                value = orjson.loads(line)
                self.num_lines += 1
                self.num_errors += "error" in value and "source" in value and value.keys() <= self._unanswered
                self.last_source = str(value.get("source", ""))
        if not self.is_complete:
            self._file.truncate(end)

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines that are on the disk when this returns. Where the disk refuses them, none of them is there."""
        # Plain JSON, in which a number that is none is null.
        content = memoryview(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
        start = self._file.seek(0, os.SEEK_END)
        try:
            with atomic.storing(self.path, num_bytes=len(content)):
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
        except StorageError:
            self._file.truncate(start)
            raise

    def finish(self) -> None:
        """Give the complete file its name."""
        with atomic.storing(self.path):
            facts = {**self._identity, COMPLETE: atomic.sha256_file(self.part)}
            atomic.write_atomic(self._progress, atomic.to_json(facts, indent=True) + b"\n")
            self._release()
            os.replace(self.part, self.path)
        self.close()

    def close(self) -> None:
        """Close the file, to be continued by a later call."""
        self._release()
        if self.is_complete:
            self.part.unlink(missing_ok=True)
        self._file.close()

    def _release(self) -> None:
        """Close the file where only a closed one can be renamed or removed; elsewhere it keeps its lock until then."""
        if not MOVES_OPEN_FILES:
            self._file.close()


def _lock(descriptor: int, path: Path) -> None:
    """Raise InputError where another process writes the file: the lines of both would be mixed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it. Wait for it, or choose another --out.") from None
    except OSError:  # a file system without locks
        return


def _refuse_changes(path: Path, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    changed = [
        f"{key} was {_short(then.get(key))}, is {_short(now.get(key))}"
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key)
    ]
    if changed:
        raise InputError(
            f"{path}: was started with something else: {'; '.join(changed)}. Put it back, choose another --out, or "
            "start again with --overwrite."
        )


def _short(value: str | None) -> str:
    return "absent" if value is None else value if len(value) <= 40 else f"{value[:12]}…"
