"""Files that are either as they were or complete, whenever the power goes.

A file or folder is written beside its place under a temporary name, synced, and renamed; the rename is synced by its
folder. What a killed process leaves behind (`.tmp-…`, `.old-…`) is dealt with by `clean`, which the owner of a folder
calls when it starts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import orjson

from tunesmith.errors import StorageError

TEMPORARY = ".tmp-"
"""Prefix of what is being written; worthless once its writer is dead."""
WRITER = "writer.lock"
"""In a temporary folder whose writer holds it."""
REPLACED = ".old-"
"""Prefix of what is being replaced; put back by `clean` if its successor never arrived."""

_WAYS_OUT = {
    errno.ENOSPC: "Free some space and try again.",
    errno.EDQUOT: "Free some space in your quota and try again.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EIO: "The disk reports a fault: use another one.",
    errno.EMFILE: "Raise the limit on open files (ulimit -n).",
    errno.ENFILE: "Raise the limit on open files of the system.",
}


@contextmanager
def storing(path: Path, *, num_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError that names path, cause and bytes.

    Where blocks are nested the outermost says what could not be written: it knows what a person asked for.
    """
    try:
        yield
    except (OSError, StorageError) as raised:
        error = raised.__cause__ if isinstance(raised, StorageError) else raised
        if not isinstance(error, OSError):
            raise
        name = errno.errorcode.get(error.errno or 0, type(error).__name__)
        size = "" if num_bytes is None else f" ({num_bytes:,} bytes needed)"
        cause = os.strerror(error.errno) if error.errno else str(error)
        way_out = _WAYS_OUT.get(error.errno or 0, "")
        message = f"{path}: cannot be written{size}: {name}: {cause}. {way_out}".rstrip()
        raise StorageError(message, path=str(path), errno_name=name, bytes_needed=num_bytes) from error


def fsync_dir(path: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path, *, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A file to write to. It takes `path`'s place when the block ends well; on any error nothing has changed.

    Raises StorageError where the disk refuses; `num_bytes` is what that message says was needed.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    with storing(path, num_bytes=num_bytes):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader, or a restart, finds the old bytes or the new, never a part."""
    with writing(path, num_bytes=len(content)) as file:
        file.write(content)


def temporary_folder(parent: Path, name: str) -> Path:
    """A fresh folder in `parent` for what will be `name`, to be filled and given to `replace_folder`."""
    path = parent / f"{TEMPORARY}{name}-{secrets.token_hex(4)}"
    with storing(path):
        parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    return path


@contextmanager
def being_written(folder: Path) -> Iterator[None]:
    """Hold a lock in a temporary folder, which ends with this process: `abandoned` then tells at once."""
    with storing(folder):
        lock = filelock.FileLock(folder / WRITER, timeout=1)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def abandoned(parent: Path) -> list[Path]:
    """Temporary folders whose writer is dead."""
    try:
        found = [path for path in sorted(parent.glob(f"{TEMPORARY}*-*")) if (path / WRITER).is_file()]
    except OSError:
        return []
    return [path for path in found if not _is_held(path / WRITER)]


def _is_held(path: Path) -> bool:
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except (filelock.Timeout, OSError):  # where it cannot be tried, it may be at work
        return True
    lock.release()
    return False


def replace_folder(tmp: Path, final: Path, *, swap: bool = False) -> None:
    """Sync everything in `tmp`, then rename it to `final`, its sibling.

    Where `final` exists: FileExistsError, or with `swap` the old one is moved aside first and removed last; a kill in
    between leaves one of the two, which `clean` puts in place.
    """
    old = final.with_name(REPLACED + final.name)
    with storing(final):
        for folder, _, names in os.walk(tmp):
            for name in names:
                fsync_file(Path(folder, name))
            fsync_dir(Path(folder))
    # Outside `storing`: a name that is taken is not a fault of the disk.
    if final.exists() and not swap:
        raise FileExistsError(errno.EEXIST, "already there, and not to be replaced", str(final))
    with storing(final):
        if final.exists():
            remove(old)  # a leftover, whose successor is `final`
            os.rename(final, old)
        try:
            os.rename(tmp, final)
        except BaseException:
            with suppress(OSError):
                os.rename(old, final)
            raise
        fsync_dir(final.parent)
        remove(old)


def remove(path: Path) -> None:
    """Delete a file or folder so that no half of it is ever seen under its name: it is renamed first."""
    if path.name.startswith(TEMPORARY):
        doomed = path
    else:
        doomed = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
        try:
            os.rename(path, doomed)
        except FileNotFoundError:
            return
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed)
    else:
        doomed.unlink(missing_ok=True)


def clean(parent: Path, *, name: str | None = None, older_than_s: float = 0.0) -> list[Path]:
    """Remove what killed writers left in `parent` and finish or undo half-done swaps; returns what was dealt with.

    Only for the one process that may write there, unless `older_than_s` keeps the work of the living safe.
    In a folder that is not ours alone, `name` limits it to what `temporary_folder(parent, name)` made.
    """
    if not parent.is_dir():
        return []
    dealt_with = []
    ours = re.compile(rf"\.(tmp|old)-{'.+' if name is None else re.escape(name) + '-[0-9a-f]{8}'}")
    for path in sorted(parent.iterdir()):
        if not ours.fullmatch(path.name):
            continue
        with storing(path), suppress(FileNotFoundError):
            if older_than_s and time.time() - path.stat().st_mtime < older_than_s:
                continue
            final = path.with_name(path.name.removeprefix(REPLACED))
            if path.name.startswith(REPLACED) and not final.exists():
                os.rename(path, final)
            else:
                remove(path)
            dealt_with.append(path)
    if dealt_with:
        with storing(parent):
            fsync_dir(parent)
    return dealt_with


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_LOOKS_NON_FINITE = re.compile(r"\\*(NaN|-?Infinity)")


def to_json(value: Any, *, indent: bool = False) -> bytes:
    """JSON in which every float comes back bit for bit from `from_json`.

    JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity". A real text of
    this form gets a backslash in front, so that the two never mix. Tuples come back as lists.
    Raises TypeError for anything but None, bool, int, float, str, mappings with text keys, lists and tuples.
    """
    return orjson.dumps(_plain(value), option=orjson.OPT_INDENT_2 if indent else None)


def from_json(text: bytes) -> Any:
    """The value that `to_json` was given. Raises ValueError where the text is not JSON."""
    return _restored(orjson.loads(text))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else json.dumps(float(value))
    if isinstance(value, str):
        # A file name that is not UTF-8 must not end a run after hours: its odd bytes are spelled out.
        text = value.encode("utf-8", "backslashreplace").decode("utf-8")
        return "\\" + text if _LOOKS_NON_FINITE.fullmatch(text) else text
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form: give it as a number, text or list")


def _restored(value: Any) -> Any:
    if isinstance(value, str):
        if _LOOKS_NON_FINITE.fullmatch(value):
            return value[1:] if value.startswith("\\") else float(value)
        return value
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value
