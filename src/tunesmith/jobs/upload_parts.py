"""Uploads in parts: parts arrive in any order and at once, and are joined in the order given at the end.

A part is a file parts/UPLOAD/PART of the store, complete or absent after a kill; it is not written
through to the disk, so that after a power cut parts may be short, which `complete` refuses by their sizes
or MD5. The joined file appears with its row and the state of its upload in one transaction, so that a
kill leaves a pending upload or a whole file.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import sqlalchemy as sa
from fastapi import Request
from pydantic import Field

from tunesmith.jobs.names import new_id, shown_name
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import files, is_pending, own, uploads
from tunesmith.jobs.uploads import (
    FIRST_LOOK_BYTES,
    check_purpose,
    declared_bytes,
    lifetime_s,
    look_at_first_row,
    receive_form,
    storing_upload,
)
from tunesmith.runs.atomic import fsync_dir, remove
from tunesmith.serve.protocol import RequestError
from tunesmith.serve.request_schemas import Parameters
from tunesmith.types import Record

MAX_JOINED_BYTES = 8 << 30
MAX_PART_BYTES = 64 << 20
MAX_PARTS = 10_000
MOST_PENDING = 100
"""Uploads of a project at once."""
LIFETIME_S = 3600
_BLOCK = 1 << 20
_NO_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EIO)
"""Errors of file systems and containers without the call; a disk's own EIO comes again from the plain copy."""
_PART = re.compile(r"part_[0-9A-Za-z]+")


class UploadBody(Parameters):
    """POST /v1/uploads"""

    bytes: int = Field(ge=1, le=MAX_JOINED_BYTES)
    filename: str = Field(min_length=1, max_length=4096)
    mime_type: str = Field(max_length=255)
    purpose: str
    expires_after: dict[Literal["anchor", "seconds"], Any] | None = None


class JoinBody(Parameters):
    """POST /v1/uploads/{id}/complete"""

    part_ids: list[str] = Field(min_length=1, max_length=MAX_PARTS)
    md5: str | None = None


def create_upload(store: Store, body: UploadBody) -> Record:
    """The row of a new upload. Raises RequestError for a wrong purpose or a project without room."""
    check_purpose(body.purpose)
    store.remove_unused()
    name, now = new_id("upload_"), int(time.time())
    row = {
        "id": name, "status": "pending", "bytes": body.bytes, "purpose": body.purpose,
        "filename": shown_name(body.filename.encode("utf-8", "replace")),
        "expires_after_s": lifetime_s(**(body.expires_after or {})),
    }  # fmt: skip
    pending = sa.select(sa.func.count()).select_from(uploads).where(*own(uploads), is_pending())
    with store.writing() as connection:
        store.check_room(connection, body.bytes)
        if (connection.scalar(pending) or 0) >= MOST_PENDING:
            message = f"{MOST_PENDING} uploads of this project are pending. Complete or cancel some."
            raise RequestError(message, status=429, code="rate_limit_exceeded", headers={"Retry-After": "60"})
        connection.execute(sa.insert(uploads).values(created_at=now, expires_at=now + LIFETIME_S, **row))
    return find_upload(store, name)


def find_upload(store: Store, name: str) -> Record:
    """Raises RequestError for one that is not there. One whose time is over has the status expired."""
    if (row := store.one(uploads, id=name)) is None:
        raise RequestError(f"No such Upload object: {name[:80]}", status=404, code="not_found", param="id")
    is_over = row["status"] == "pending" and row["expires_at"] <= time.time()
    return {**row, "status": "expired"} if is_over else row


def _pending(store: Store, name: str) -> Record:
    row = find_upload(store, name)
    if row["status"] != "pending":
        message = f"Upload {name} is {row['status']}: only a pending one can be changed."
        raise RequestError(message, code="invalid_state")
    return row


async def add_part(request: Request, store: Store, upload: str) -> str:
    """Store a part of a pending upload and return its id. On a RequestError nothing is left of it."""
    row = await asyncio.to_thread(_pending, store, upload)
    folder, part = store.parts_path / upload, new_id("part_")
    folder.mkdir(mode=0o700, exist_ok=True)
    sizes = list[int]()
    for path in folder.glob("[!.]*"):
        with suppress(FileNotFoundError):  # another part has got its own name meanwhile
            sizes.append(path.stat().st_size)
    left = 2 * row["bytes"] - sum(sizes) - store.arriving[upload]  # nothing waits between here and its change
    if len(sizes) >= MAX_PARTS or left <= 0:
        raise RequestError(f"Upload {upload} has twice its {row['bytes']:,} bytes in parts already.", param="data")
    most = min(MAX_PART_BYTES, row["bytes"], left, declared_bytes(request) or MAX_PART_BYTES)
    with store.receiving(upload, most):
        await receive_form(
            request, folder / part, lambda form: None, content="data", texts=(), max_bytes=most, is_part=True
        )
    return part


def cancel_upload(store: Store, name: str) -> Record:
    """Drop a pending upload with its parts. Raises RequestError for one that has ended."""
    _pending(store, name)
    matches = sa.update(uploads).where(uploads.c.id == name, uploads.c.status == "pending")
    with store.writing() as connection:
        connection.execute(matches.values(status="cancelled"))
    remove(store.parts_path / name)
    return find_upload(store, name)


def complete_upload(store: Store, name: str, body: JoinBody) -> Record:
    """Join the parts to a file. The same call again gives the same answer.

    Raises RequestError, and the upload stays pending: for an unknown part, other size or MD5, a useless file.
    """
    with store.joining.setdefault(name, threading.Lock()):  # of several calls the first joins, the others see it
        try:
            return _completed(store, name, body)
        finally:
            store.joining.pop(name, None)


def _completed(store: Store, name: str, body: JoinBody) -> Record:
    row = find_upload(store, name)
    if row["status"] == "completed" and row["part_ids"] == body.part_ids:
        return row
    row = _pending(store, name)
    parts = [_part(store, name, part) for part in body.part_ids]
    if (num := sum(path.stat().st_size for path in parts)) != row["bytes"] or len(set(parts)) < len(parts):
        message = f"part_ids: these parts have {num:,} bytes, each once, and not the {row['bytes']:,} of the upload."
        raise RequestError(message, param="part_ids")
    file = new_id("file-")
    temporary = store.content_path(f".{file}")
    try:
        with storing_upload():
            sha256 = _join(parts, temporary, row["purpose"], body.md5)
            _publish(store, row, file, {"part_ids": body.part_ids, "sha256": sha256})
    finally:
        temporary.unlink(missing_ok=True)
    remove(store.parts_path / name)
    return find_upload(store, name)


def _part(store: Store, upload: str, part: str) -> Path:
    path = store.parts_path / upload / part
    if not _PART.fullmatch(part) or not path.is_file():
        raise RequestError(f"part_ids: {part[:60]!r} is not part of this upload.", param="part_ids")
    return path


def _join(parts: Sequence[Path], out: Path, purpose: str, md5: str | None) -> str:
    """Write the parts behind one another, a block at a time; returns their SHA-256."""
    digests = [hashlib.sha256(), *([] if md5 is None else [hashlib.md5(usedforsecurity=False)])]
    with open(out, "xb") as joined:
        for part in parts:
            with open(part, "rb", buffering=0) as content:
                while block := content.read(_BLOCK):
                    for digest in digests:
                        digest.update(block)
                _append(content, joined)
        os.fsync(joined.fileno())
    if md5 is not None and md5.lower() != (actual_md5 := digests[1].hexdigest()):
        raise RequestError(
            f"md5: the parts have {actual_md5}. Send the wrong ones again, or create the upload anew.", param="md5"
        )
    if purpose == "fine-tune":
        with open(out, "rb") as content:
            look_at_first_row(content.read(FIRST_LOOK_BYTES))
    return digests[0].hexdigest()


def _append(source: FileIO, out: BinaryIO) -> None:
    """Copy a file behind what `out` has: by the system, which need not read it, where it can."""
    source.seek(0)
    try:
        while os.copy_file_range(source.fileno(), out.fileno(), MAX_PART_BYTES):
            pass
    except (AttributeError, OSError) as error:  # macOS has no such call
        if getattr(error, "errno", errno.ENOSYS) not in _NO_COPY:
            raise
    shutil.copyfileobj(source, out, _BLOCK)  # what is left
    out.flush()


def _publish(store: Store, row: Record, file: str, found: Record) -> None:
    """The file, its row and the state of the upload in one transaction; RequestError if it has ended."""
    matches = sa.update(uploads).where(uploads.c.id == row["id"], uploads.c.status == "pending")
    now, lifetime = int(time.time()), row["expires_after_s"]
    facts = {key: row[key] for key in ("purpose", "filename", "bytes")}
    facts |= {"id": file, "sha256": found["sha256"], "expires_at": lifetime and now + lifetime}
    with store.writing() as connection:
        done = connection.execute(matches.values(status="completed", file=file, part_ids=found["part_ids"]))
        if not done.rowcount:
            raise RequestError(f"Upload {row['id']} has ended meanwhile.", code="invalid_state")
        store.check_room(connection, row["bytes"])
        os.replace(store.content_path(f".{file}"), store.content_path(file))
        fsync_dir(store.files_path)
        connection.execute(store.insert_new(files).values(created_at=now, **facts))
