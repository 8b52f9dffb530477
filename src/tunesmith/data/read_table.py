"""CSV and TSV: every value stays text; a broken quote ends the file, since nobody knows where the next row begins."""

from __future__ import annotations

import csv
from collections.abc import Iterator

from tunesmith.data.detect_format import ByteStream, FileFacts, distinct
from tunesmith.data.problems import refusal
from tunesmith.data.read_json import BadRow, OnBadRow, invalid_utf8, nul_character, too_long
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Limits


def csv_rows(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row's first line and values by column; blank lines are counted and left out.

    Raises:
        DataError: the header is unusable, or a quote is broken: nothing then says where the next row begins.
    """
    for line, values in _records(stream, facts, limits=limits, on_bad=on_bad):
        if facts.columns is None:
            facts.columns = distinct(facts, values, line)
            continue
        facts.rows += 1
        if len(values) == len(facts.columns):
            yield line, dict(zip(facts.columns, values, strict=True))
        else:
            message = f"it has {len(values)} values, the header names {len(facts.columns)}"
            fix = "Put text that contains the separator or a line break in double quotes."
            on_bad(line, BadRow("ragged_row", message, fix), 0)


def _records(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, list[str]]]:
    # The csv module knows one limit for the whole process; ours is kept by _Lines.
    csv.field_size_limit(max(csv.field_size_limit(), limits.line_bytes + 1))
    lines = _Lines(stream, facts, limits.line_bytes)
    reader = csv.reader(lines, delimiter=facts.delimiter, strict=True)
    while True:
        lines.begin()
        try:
            values = next(reader)
        except StopIteration:
            return
        except _TooLong:
            lines.bad = too_long(lines.skip_row(), limits.line_bytes)
            if lines.at_end:
                raise _broken_quote(facts, lines) from None
        except csv.Error as error:
            raise _broken_quote(facts, lines, str(error)) from None
        if lines.bad is not None:
            if facts.columns is None:
                raise refusal(facts.path, lines.first, lines.bad.code, f"the header: {lines.bad}.", lines.bad.fix)
            facts.rows += 1
            on_bad(lines.first, lines.bad, lines.offset)
        elif not values or (len(values) == 1 and not values[0].strip()):
            facts.blank += lines.line - lines.first + 1
        else:
            yield lines.first, values


def _broken_quote(facts: FileFacts, lines: _Lines, reason: str = "") -> DataError:
    if lines.at_end:
        code, message = "unclosed_quote", "a double quote opens here and is never closed."
        fix = "Close it; write a quote in text twice."
    elif "new-line" in reason:
        code, message = "bad_csv", "it has a carriage return without a line feed."
        fix = "Save the file with ordinary line ends."
    else:
        code, message, fix = "bad_csv", f"not CSV: {reason}.", 'Write a quote inside quoted text twice, "".'
    return refusal(facts.path, lines.first, code, message, f"{fix} Nothing after it was read.")


class _TooLong(Exception):
    """The row has more bytes than the limit."""


class _Lines:
    """The lines of a file for the csv module, as text; what is wrong with the current row is kept in `bad`."""

    def __init__(self, stream: ByteStream, facts: FileFacts, limit: int) -> None:
        self.first = 1
        """Line on which the current row begins."""
        self.offset = 0
        """Byte at which it begins."""
        self.line = 0
        self.at_end = False
        self.bad: BadRow | None = None
        self._stream = stream
        self._facts = facts
        self._limit = limit
        self._read = 3 if facts.has_bom else 0
        self._size = 0
        self._num_quotes = 0

    def begin(self) -> None:
        self.first = self.line + 1
        self.offset = self._read
        self.bad = None
        self._size = self._num_quotes = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._take(self._limit + 2)
        if not raw:
            self.at_end = True
            raise StopIteration
        if self._size > self._limit + 2 or len(raw.rstrip(b"\r\n")) > self._limit:
            self._end_line(raw)
            raise _TooLong
        at = self._size - len(raw)
        if b"\0" in raw:
            self.bad = self.bad or nul_character(at + raw.find(b"\0"))
            raw = raw.replace(b"\0", b"")
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            bad = invalid_utf8(raw, error.start)
            bad.at = at + error.start
            self.bad = self.bad or bad
            # Only the row's structure is still wanted: the row itself is left out.
            return raw.decode("utf-8", "replace")

    def skip_row(self) -> int:
        """Skip to the end of a row that is too long: the first line end outside quotes. Returns the row's bytes."""
        while self._num_quotes % 2:
            raw = self._take(self._limit)
            if not raw:
                self.at_end = True
                break
            self._end_line(raw)
        return self._size

    def _take(self, size: int) -> bytes:
        raw = self._stream.readline(size)
        if raw:
            self.line += 1
            self._facts.line = self.line
        self._count(raw)
        return raw

    def _count(self, raw: bytes) -> None:
        self._size += len(raw)
        self._read += len(raw)
        self._num_quotes += raw.count(b'"')

    def _end_line(self, raw: bytes) -> None:
        while raw and not raw.endswith(b"\n"):
            raw = self._stream.readline(self._limit)
            self._count(raw)
