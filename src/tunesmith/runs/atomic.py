"""Files that are either as they were or complete, whenever the power goes.

A file or folder is written next to its place under a temporary name, synced, and renamed; the rename is synced
by its folder. A killed process leaves `.tmp-…` and `.old-…` behind; the owner of a folder calls `clean` when it
starts, which removes them or puts them back.
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
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import filelock
import orjson

from tunesmith.errors import InputError, StorageError

TEMPORARY = ".tmp-"
"""Prefix of files that are being written; worthless once their writer is dead."""
REPLACED = ".old-"
"""Prefix of files that are being replaced; `clean` puts them back if their successor never arrived."""

_AT_WORK, _BEGUN_S = "at-work.lock", 10.0
"""File of a temporary folder that its writer locks, and seconds after which it has done so."""

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

    In nested blocks the outermost names the path: it knows what the user wanted written.
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
    with open(path, "r+b" if os.name == "nt" else "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def writing(path: Path, *, num_bytes: int | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing. It takes `path`'s place when the block ends well; on an error nothing changes.

    Raises StorageError if the disk refuses, with `num_bytes` as the size needed.
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
    """Write `content` to `path` so that a reader, or a restart, finds old bytes or new, never a part."""
    with writing(path, num_bytes=len(content)) as file:
        file.write(content)


def link_or_copy(source: Path, path: Path) -> None:
    """Put a file at another place too, by hard link where the disk allows. Raises OSError, StorageError."""
    try:
        os.link(source, path)
    except OSError:
        with open(source, "rb") as content, writing(path) as copy:
            shutil.copyfileobj(content, copy, 1 << 20)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that exists or will; `sys.maxsize` where the system does not say."""
    try:
        return shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())).free
    except OSError:
        return sys.maxsize


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raise InputError for an output file that is there already, unless it may be overwritten, or has no
    folder."""
    if path.exists() and not overwrite:
        raise InputError(f"{path}: is there already. Choose another --out, or write over it with --overwrite.")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"{path}: {path.parent} is no folder that may be written. Make it, or choose another --out.")


def temporary_folder(parent: Path, name: str) -> Path:
    """Make a fresh folder in `parent`, to be filled and given to `replace_folder` as `name`."""
    path = parent / f"{TEMPORARY}{name}-{secrets.token_hex(4)}"
    with storing(path):
        parent.mkdir(parents=True, exist_ok=True)
        path.mkdir()
    return path


def replace_folder(tmp: Path, final: Path, *, swap: bool = False) -> None:
    """Sync everything in `tmp`, then rename it to `final`, its sibling.

    If `final` exists: FileExistsError, or with `swap` the old one is moved aside first and removed last; after
    a kill in between `clean` puts the old one back and deletes the new one.
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


@contextmanager
def writing_folder(final: Path, *, num_bytes: int | None = None) -> Iterator[Path]:
    """Give a folder to fill, which then takes the place of `final`; after an exception nothing of it remains.

    Raises StorageError where the disk refuses.
    """
    staged = temporary_folder(final.parent, final.name)
    try:
        with storing(final, num_bytes=num_bytes):
            yield staged
        replace_folder(staged, final, swap=True)
    except BaseException:
        remove(staged)
        raise


def remove(path: Path) -> None:
    """Delete a file or folder. It is renamed first, so that no half of it is ever seen under its name."""
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


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Show `clean` that the writer of a temporary folder lives, by a lock that the system ends with it."""
    lock = filelock.FileLock(folder / _AT_WORK)
    with suppress(NotImplementedError, OSError):  # a file system without locks: `clean` goes by age
        lock.acquire(timeout=0)
    try:
        yield
    finally:
        lock.release()


def _is_left(folder: Path) -> bool:
    """Whether the process that filled a temporary folder is known to have ended."""
    if not (folder / _AT_WORK).exists():
        return False
    try:
        with filelock.FileLock(folder / _AT_WORK).acquire(timeout=0):
            return True
    except (filelock.Timeout, NotImplementedError, OSError):
        return False


def clean(parent: Path, *, name: str | None = None, older_than_s: float = 0.0) -> list[Path]:
    """Remove leftovers of killed writers in `parent` and finish or undo half-done swaps; returns their paths.

    Only the one process that may write there calls this, unless `older_than_s` protects the work of living
    ones; what a process had `at_work` goes when it has ended. In a shared folder, `name` limits it to folders
    made by `temporary_folder(parent, name)`.
    """
    if not parent.is_dir():
        return []
    handled = []
    ours = re.compile(rf"\.(tmp|old)-{'.+' if name is None else re.escape(name) + '-[0-9a-f]{8}'}")
    for path in sorted(parent.iterdir()):
        if not ours.fullmatch(path.name):
            continue
        with storing(path), suppress(FileNotFoundError):
            age = time.time() - path.stat().st_mtime
            if older_than_s and age < older_than_s and not (age > _BEGUN_S and _is_left(path)):
                continue
            final = path.with_name(path.name.removeprefix(REPLACED))
            if path.name.startswith(REPLACED) and not final.exists():
                os.rename(path, final)
            else:
                remove(path)
            handled.append(path)
    if handled:
        with storing(parent):
            fsync_dir(parent)
    return handled


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


_LOOKS_NON_FINITE = re.compile(r"\\*(NaN|-?Infinity)")


def to_json(value: object, *, indent: bool = False) -> bytes:
    """Serialize as JSON so that every float comes back bit for bit from `from_json`.

    JSON has no NaN and no infinity: they are written as the strings "NaN", "Infinity" and "-Infinity". A real
    text of this form gets a backslash in front, so that the two never mix. Tuples come back as lists. Raises
    TypeError for anything but None, bool, int, float, str, mappings with text keys, lists and tuples.
    """
    return orjson.dumps(_plain(value), option=orjson.OPT_INDENT_2 if indent else None)


def from_json(text: bytes) -> Any:
    """Restore a value written by `to_json`. Raises ValueError if the text is not JSON."""
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
