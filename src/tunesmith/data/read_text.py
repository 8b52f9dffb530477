"""JSON lines and JSON arrays, one row at a time and never more than one row in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from tunesmith.data.findings import refusal
from tunesmith.data.opening import FileFacts, Stream
from tunesmith.data.strict_json import BadRow, loads
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Limits

OnBadRow = Callable[[int, BadRow, int], None]
"""Line, what is wrong with it, and the byte at which the row begins."""

CHUNK_BYTES = 256 * 1024


def json_lines(stream: Stream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, Any]]:
    """Each line's number and value; blank lines are counted and left out."""
    limit, depth = limits.line_bytes, limits.depth
    offset = 3 if facts.has_bom else 0
    while raw := stream.readline(limit + 2):
        facts.line += 1
        if len(raw) > limit and len(raw.rstrip(b"\r\n")) > limit:
            size = len(raw) + rest_of_line(stream, raw)
            facts.rows += 1
            on_bad(facts.line, too_long(size, limit), offset)
            offset += size
            continue
        if raw.isspace():
            facts.blank += 1
        else:
            facts.rows += 1
            try:
                yield facts.line, loads(raw, depth=depth)
            except BadRow as bad:
                on_bad(facts.line, bad, offset)
        offset += len(raw)


def rest_of_line(stream: Stream, raw: bytes) -> int:
    """Skip to the end of a line of which `raw` was read. Returns the number of bytes skipped."""
    size = 0
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(CHUNK_BYTES)
        size += len(raw)
    return size


def too_long(size: int, limit: int) -> BadRow:
    return BadRow(
        "line_too_long",
        f"its {size:,} bytes are more than data.limits.line_bytes, which is {limit:,}",
        "Split it, or raise the limit.",
    )


def json_array(stream: Stream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, Any]]:
    """Each element's number, from 1, and value.

    Raises `DataError` where the array is not JSON: nothing then says where the next row begins.
    """
    for raw, size, offset in _elements(stream, facts, limits.line_bytes):
        facts.line += 1
        facts.rows += 1
        if size > limits.line_bytes:
            on_bad(facts.line, too_long(size, limits.line_bytes), offset)
            continue
        if not raw.strip():
            raise _broken(facts, f"no value stands beside a comma (byte {offset}).", "Remove the comma.")
        try:
            value = loads(raw, depth=limits.depth)
        except BadRow as bad:
            if bad.code in ("bad_json", "truncated_json"):
                raise _broken(facts, f"{bad.message} (byte {offset + (bad.at or 0)}).", bad.fix) from None
            on_bad(facts.line, bad, offset)
        else:
            yield facts.line, value


_DEEP = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_FLAT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_TO_QUOTE = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def _elements(stream: Stream, facts: FileFacts, limit: int) -> Iterator[tuple[bytes, int, int]]:
    """The elements of an array: bytes (cut where longer than `limit`), size, and place in the file."""
    cutter = _Cutter(limit, 3 if facts.has_bom else 0)
    while chunk := stream.read(CHUNK_BYTES):
        yield from cutter.feed(chunk)
        if cutter.ended:
            _nothing_follows(cutter, stream, facts)
            return
    facts.line += 1
    message = f"the array is not closed: the file ends in row {facts.line}, …{cutter.tail()!r}."
    raise refusal(facts.path, facts.line, "truncated_json", message, "Copy or export it again.")


class _Cutter:
    """Cuts a JSON array into its elements, however the bytes arrive, without looking into them."""

    def __init__(self, limit: int, offset: int) -> None:
        self.rest = b""
        """What follows the array."""
        self.ended = False
        self._limit = limit
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._parts: list[bytes] = []
        self._size = 0
        self._begin = offset
        self._num_cut = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes, int, int]]:
        """The elements that end in this chunk."""
        kept = at = 0
        if self._in_string:
            at = self._leave_string(chunk)
        while not self._in_string:
            match = (_DEEP if self._depth > 1 else _FLAT).search(chunk, at)
            if match is None:
                break
            at = match.end()
            mark = chunk[match.start()]
            if mark in b"[{":
                self._depth += 1
                if self._depth == 1:
                    self._begin += at
                    kept = at
            elif mark in b"]}":
                self._depth -= 1
            elif mark == ord('"') and at - match.start() == 1:
                self._in_string = True
                self._escaped = _ends_escaped(chunk[at:])
            is_cut = (self._depth == 1 and mark == ord(",")) or self._depth == 0
            if is_cut:
                yield from self._cut(chunk[kept : match.start()], is_last=self._depth == 0)
                kept = at
            if self._depth == 0:
                self.ended = True
                self.rest = chunk[at:]
                return
        self._keep(chunk[kept:])

    def tail(self) -> str:
        return b"".join(self._parts)[-40:].decode("utf-8", "replace")

    def _leave_string(self, chunk: bytes) -> int:
        """Where the string ends that began in an earlier chunk; `_in_string` stays set when it does not."""
        start = 1 if self._escaped else 0
        match = _TO_QUOTE.match(chunk, start)
        if match is None:
            self._escaped = _ends_escaped(chunk[start:])
            return len(chunk)
        self._in_string = False
        return match.end()

    def _keep(self, piece: bytes) -> None:
        if self._size <= self._limit:
            self._parts.append(piece)
        self._size += len(piece)

    def _cut(self, piece: bytes, *, is_last: bool) -> Iterator[tuple[bytes, int, int]]:
        self._keep(piece)
        raw, size, begin = b"".join(self._parts), self._size, self._begin
        self._parts, self._size, self._begin = [], 0, begin + size + 1
        if raw.strip() or self._num_cut or not is_last:
            yield raw, size, begin
        self._num_cut += 1


def _ends_escaped(piece: bytes) -> bool:
    return (len(piece) - len(piece.rstrip(b"\\"))) % 2 == 1


def _nothing_follows(cutter: _Cutter, stream: Stream, facts: FileFacts) -> None:
    rest = cutter.rest
    while rest or (rest := stream.read(CHUNK_BYTES)):
        if rest.strip():
            facts.line += 1
            what = rest.strip()[:20].decode("utf-8", "replace")
            fix = "Several arrays in one file: join them, or write one object a line."
            raise refusal(facts.path, facts.line, "trailing_data", f"{what!r} stands after the end of the array.", fix)
        rest = b""


def _broken(facts: FileFacts, message: str, fix: str) -> DataError:
    fix = f"{fix} Nothing after it was read.".strip()
    return refusal(facts.path, facts.line, "bad_json", message, fix)
