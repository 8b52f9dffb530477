"""A multipart upload, streamed to a temporary file: bounded memory, fields in any order, names as data."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from fastapi import Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from tunesmith.jobs.names import DEFAULT_PROJECT, new_id, shown_name
from tunesmith.jobs.repeats import file_made_before, retry_count
from tunesmith.jobs.store import Store
from tunesmith.runs.atomic import fsync_dir
from tunesmith.serve.middleware import PROJECT
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Record

MAX_BYTES = 2 << 30
MAX_FIELD_BYTES = 4096
MAX_FIELDS = 16
MAX_PART_HEADER_BYTES = 8192
SLOW_S, SLOW_BYTES = 30.0, 480 * 1024
"""Fewest bytes in SLOW_S seconds, but for the last ones: 16 KiB a second."""
FIRST_LOOK_BYTES = 8 << 20
"""Bytes of a training file within which its first row has to end."""
PARSED_BYTES = 64 << 10
"""Most bytes of a first row parsed between requests: 2 ms at most, when none is answered (8 MiB: 0.8 s)."""
PURPOSES = ("fine-tune", "assistants", "batch", "vision", "user_data", "evals")
FORM_BYTES = 4096
"""Most bytes of a form around its file."""
LIFETIMES_S = (3600, 2_592_000)
_EXPIRY = ("expires_after[anchor]", "expires_after[seconds]")
UNAVAILABLE = 503
NO_JSONL = "Invalid file format for Fine-Tuning API. Must be .jsonl"


@dataclass
class Form:
    """Callbacks of the parser. The field named `content` goes to `out`, those named in `texts` are kept."""

    out: BinaryIO
    content: str
    texts: tuple[str, ...]
    max_bytes: int
    fields: dict[str, bytes] = field(default_factory=dict)
    filename: bytes | None = None
    num_bytes: int = 0
    head: bytearray = field(default_factory=bytearray)
    is_complete: bool = False
    digest: Any = None
    """SHA-256 of the content so far; None: it is not computed."""
    _header: list[bytearray] = field(default_factory=lambda: [bytearray(), bytearray()])
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _num_parts: int = 0
    _name: str = ""

    def text(self, name: str) -> str:
        """A field that is there."""
        return self.fields[name].decode("utf-8", "replace")

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._start,
            "on_part_data": lambda data, start, end: self._take(data[start:end]),
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._headers, self._header = {}, [bytearray(), bytearray()]
        self._num_parts += 1
        if self._num_parts > MAX_FIELDS:
            raise RequestError(f"The form has more than {MAX_FIELDS} fields.")

    def _add_header(self, part: int, data: bytes) -> None:
        self._header[part] += data
        if sum(map(len, self._header)) > MAX_PART_HEADER_BYTES or len(self._headers) > MAX_FIELDS:
            raise RequestError(f"The headers of a field have more than {MAX_PART_HEADER_BYTES:,} bytes.")

    def _end_header(self) -> None:
        self._headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def _start(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        known = (self.content, *self.texts)
        if self._name not in known:
            known_names = f"{'there are' if self.texts else 'there is'} {' and '.join(known)}"
            raise RequestError(f"{self._name[:60]!r}: unknown field; {known_names}.", param=self._name[:60])
        if self._name in self.fields:
            raise RequestError(f"{self._name}: is given twice.", param=self._name)
        self.fields[self._name] = b""
        if self._name == self.content:
            self.filename = options.get(b"filename", b"upload")

    def _take(self, data: bytes) -> None:
        if self._name != self.content:
            self.fields[self._name] += data
            if len(self.fields[self._name]) > MAX_FIELD_BYTES:
                raise RequestError(f"{self._name}: has more than {MAX_FIELD_BYTES:,} bytes.", param=self._name)
            return
        self.num_bytes += len(data)
        if self.num_bytes > self.max_bytes:
            message = f"{self.content}: has more than {self.max_bytes:,} bytes."
            raise RequestError(message, status=413, code="file_too_large", param=self.content)
        if len(self.head) < FIRST_LOOK_BYTES and b"\n" not in self.head.lstrip():
            self.head += data
        if self.digest is not None:
            self.digest.update(data)
        self.out.write(data)

    def _end(self) -> None:
        self.is_complete = True


async def receive_file(request: Request, store: Store) -> Record:
    """The row of an uploaded file. Raises RequestError; nothing is left of it then."""
    declared, project = declared_bytes(request), PROJECT.get() or DEFAULT_PROJECT
    least = max((declared or 0) - FORM_BYTES, 1)
    room = await asyncio.to_thread(store.check_room, None, least)
    left = MAX_BYTES if room is None else room - store.arriving[project]
    if room is not None and left < least:
        message = "Files that are on their way need the room that this project has left. Try again later."
        raise RequestError(message, status=429, code="rate_limit_exceeded", headers={"Retry-After": "10"})
    name, most = new_id("file-"), min(MAX_BYTES, declared or MAX_BYTES, left)
    try:
        with store.receiving(project, most):
            form = await receive_form(
                request, store.content_path(name), _check_file, content="file", texts=("purpose",), optional=_EXPIRY,
                max_bytes=most,
            )  # fmt: skip
    except RequestError as error:
        if error.code == "file_too_large" and most == left:
            await asyncio.to_thread(store.check_room, None, most + 1)  # which names the project's limit
        raise
    anchor, seconds = (form.text(field) if field in form.fields else None for field in _EXPIRY)
    lifetime = lifetime_s(anchor, seconds)
    row = {
        "id": name, "purpose": form.text("purpose"), "filename": shown_name(form.filename or b""),
        "bytes": form.num_bytes, "sha256": form.digest.hexdigest(),
        "expires_at": None if lifetime is None else int(time.time()) + lifetime,
    }  # fmt: skip
    if (earlier := await asyncio.to_thread(file_made_before, store, row, retry_count(request))) is not None:
        store.content_path(name).unlink(missing_ok=True)
        return earlier
    try:
        return await asyncio.to_thread(store.add_file, row)
    except RequestError as error:
        if error.status != UNAVAILABLE:  # else the row may be there
            store.content_path(name).unlink(missing_ok=True)
        raise


def declared_bytes(request: Request) -> int | None:
    """The length of a body by its header; None: it comes in chunks."""
    length = request.headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() else None


def lifetime_s(anchor: object = None, seconds: object = None) -> int | None:
    """The time that a client lets a file live; None: it says nothing. Raises RequestError."""
    if anchor is None and seconds is None:
        return None
    least, most = LIFETIMES_S
    text = str(seconds)
    if anchor != "created_at" or not (
        text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most
    ):
        message = f"expires_after: has the anchor created_at, and seconds from {least:,} to {most:,}."
        raise RequestError(message, param="expires_after")
    return int(text)


async def receive_form(
    request: Request,
    target: Path,
    check: Callable[[Form], None],
    *,
    content: str,
    texts: tuple[str, ...],
    max_bytes: int,
    optional: tuple[str, ...] = (),
    is_part: bool = False,
) -> Form:
    """A form whose field `content` was written to `target`, complete or not at all. Raises RequestError.

    `is_part`: neither hashed nor synced. The end reads it again, and refuses what a power cut left too short.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not 0 < len(options.get(b"boundary", b"")) <= 256:
        message = "A file has to be sent as Content-Type: multipart/form-data."
        raise RequestError(message, status=415, code="unsupported_media_type")
    temporary = target.with_name(f".{target.name}")
    try:
        with storing_upload(), open(temporary, "xb") as out:
            digest = None if is_part else hashlib.sha256()
            form = Form(out, content, (*texts, *optional), max_bytes, digest=digest)
            await _feed(request, MultipartParser(options[b"boundary"], form.callbacks()))
            if not form.is_complete:
                raise RequestError("The form stops before its end.", code="invalid_form")
            for name in (content, *texts):
                if name not in form.fields:
                    raise RequestError(f"{name}: is missing.", param=name)
            if not form.num_bytes:
                raise RequestError("The file is empty.", param=content)
            await asyncio.to_thread(check, form)
            out.flush()
            if not is_part:
                await asyncio.to_thread(os.fsync, out.fileno())
            os.replace(temporary, target)
            if not is_part:
                fsync_dir(target.parent)
    except BaseException:
        with suppress(OSError):
            target.unlink(missing_ok=True)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return form


@contextmanager
def storing_upload() -> Iterator[None]:
    """Turn an OSError inside the block into a RequestError: the disk is full, trying again does not help."""
    try:
        yield
    except OSError as error:
        message = f"The file could not be stored: {error.strerror}."
        raise RequestError(message, status=507, code="storage_full", headers={"x-should-retry": "false"}) from None


async def _feed(request: Request, parser: MultipartParser) -> None:
    since, num_bytes, more = time.monotonic(), 0, True
    try:
        while more:
            event = await asyncio.wait_for(request.receive(), SLOW_S)
            if event["type"] == "http.disconnect":
                raise ClientDisconnect
            body = event.get("body", b"")
            num_bytes += len(body)
            more = event.get("more_body", False)
            for start in range(0, len(body), 1 << 20):
                await asyncio.to_thread(parser.write, body[start : start + (1 << 20)])
            if time.monotonic() - since > SLOW_S:
                if num_bytes < SLOW_BYTES and more:
                    raise asyncio.TimeoutError
                since, num_bytes = time.monotonic(), 0
        parser.finalize()
    except asyncio.TimeoutError:
        message = f"The file came slower than {SLOW_BYTES // 1024} KiB in {SLOW_S:g} s."
        raise RequestError(message, status=408, code="request_timeout") from None
    except MultipartParseError as error:
        message = f"The form cannot be read: {error}."
        raise RequestError(message, code="invalid_form") from None


def _check_file(form: Form) -> None:
    """Raises RequestError for a purpose that is none, or a file that no job could use."""
    check_purpose(form.text("purpose"))
    if form.text("purpose") == "fine-tune":
        look_at_first_row(bytes(form.head))


def check_purpose(purpose: str) -> None:
    """Raises RequestError."""
    if purpose not in PURPOSES:
        raise RequestError(f"'{purpose[:60]}' is not one of {list(PURPOSES)} - 'purpose'", param="purpose")


def look_at_first_row(head: bytes) -> None:
    """Raises RequestError if the first line that is not blank is no JSON object."""
    line = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(NO_JSONL, code="invalid_file_format", param="file") from None
    if not _is_object(line.rstrip()):
        message = (
            "Expected file to have JSONL format, where every line is a JSON dictionary. Line 1 is not a dictionary "
            f'(HINT: line starts with: "{text[:4]}...").'
        )
        raise RequestError(message, code="invalid_file_format", param="file")


def _is_object(line: bytes) -> bool:
    """Only the ends of a long line are looked at: the process that checks the files of a job reads it whole."""
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return False
    if len(line) <= PARSED_BYTES:
        try:
            orjson.loads(line)
        except ValueError:
            return False
    return True
