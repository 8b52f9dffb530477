"""Tables, row by row: CSV and TSV, whose every value stays text, and Parquet with its stored types.

A broken quote ends a CSV file, since nobody knows where the next row begins."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.detect_format import ByteStream, FileFacts, cannot_open, distinct, open_packed
from tunesmith.data.problems import refusal
from tunesmith.data.read_json import BadRow, OnBadRow, count_blank, decode, nul_character, strings, too_long
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Limits
from tunesmith.types import JsonObject


def csv_rows(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row's first line and values by column; blank lines are left out.

    Raises:
        DataError: header unusable, quote broken or row too long: nothing says where the next row begins.
    """
    # The csv module knows one limit for the whole process; ours is for a row.
    csv.field_size_limit(max(csv.field_size_limit(), limits.line_bytes + 1))
    row, size, num_blank = list[bytes](), 0, 0
    """The lines of the current row, and their bytes."""

    def lines() -> Iterator[str]:
        nonlocal size
        while raw := stream.readline(limits.line_bytes + 2):
            facts.line += 1
            row.append(raw)
            size += len(raw)
            if size - len(raw) + len(raw.rstrip(b"\r\n")) > limits.line_bytes:
                message = f"it has more bytes than data.limits.line_bytes, which is {limits.line_bytes:,}."
                fix = "Close a double quote that is open, split the row, or raise the limit. Nothing after it was read."
                raise refusal(facts.path, facts.line + 1 - len(row), "line_too_long", message, fix)
            yield raw.replace(b"\0", b"").decode("utf-8", "replace")  # a row with either is left out

    reader = csv.reader(lines(), delimiter=facts.delimiter, strict=True)
    while True:
        if facts.skip_to > facts.line + 1:
            facts.line += _skip_unquoted(stream, facts.skip_to - 1 - facts.line)
        first, size = facts.line + 1, 0
        row.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise _broken_quote(facts, first, str(error)) from None
        if first < facts.skip_to:
            continue
        bad = _unreadable(row)
        if bad is None and (not values or (len(values) == 1 and not values[0].strip())):
            num_blank = count_blank(num_blank, facts)
            continue
        num_blank = 0
        if facts.columns is None:
            if bad is not None:
                raise refusal(facts.path, first, bad.code, f"the header: {bad}.", bad.fix)
            facts.columns = distinct(facts, values, first)
            continue
        facts.rows += 1
        if bad is None and len(values) != len(facts.columns):
            message = f"it has {len(values)} values, the header names {len(facts.columns)}"
            fix = "Put text that contains the separator or a line break in double quotes."
            bad = BadRow("ragged_row", message, fix)
        if bad is None:
            yield first, dict(zip(facts.columns, values, strict=True))
        else:
            on_bad(first, bad)


def _skip_unquoted(stream: ByteStream, num: int) -> int:
    """Go on behind at most `num` lines without a double quote, each of which is a row, at the speed of the
    disk. Returns how many there were before the first with one."""
    num_skipped = 0
    while num_skipped < num and (piece := stream.peek(1)):  # type: ignore[attr-defined]
        quote = piece.find(b'"')
        end = piece.rfind(b"\n", 0, len(piece) if quote < 0 else quote) + 1
        num_here = min(piece.count(b"\n", 0, end), num - num_skipped)
        if not num_here:  # the next line has a quote, or more bytes than a piece
            break
        if num_skipped + num_here == num:
            end = 0
            for _ in range(num_here):
                end = piece.index(b"\n", end) + 1
        stream.read(end)
        num_skipped += num_here
    return num_skipped


def _unreadable(row: list[bytes]) -> BadRow | None:
    """The first problem of the bytes of a row."""
    raw = b"".join(row)
    try:
        decode(raw)
    except BadRow as bad:
        return bad
    return nul_character(raw.find(b"\0")) if b"\0" in raw else None


def _broken_quote(facts: FileFacts, line: int, reason: str) -> DataError:
    if "end of data" in reason:
        code, message = "unclosed_quote", "a double quote opens here and is never closed."
        fix = "Close it; write a quote in text twice."
    elif "new-line" in reason:
        code, message = "bad_csv", "it has a carriage return without a line feed."
        fix = "Save the file with ordinary line ends."
    else:
        code, message, fix = "bad_csv", f"not CSV: {reason}.", 'Write a quote inside quoted text twice, "".'
    return refusal(facts.path, line, code, message, f"{fix} Nothing after it was read.")


BATCH_BYTES = 16 * 1024 * 1024
MOST_ROWS = 64
"""Rows read at once. A text that repeats is stored once: a file of a kilobyte can hold rows of gigabytes."""
_BROKEN = (pa.ArrowException, OSError, ValueError)
"""Errors of pyarrow for a damaged file; ValueError for a column name that is not text."""
_UNHOLDABLE = (pa.ArrowException, ValueError, OverflowError)


def parquet_rows(facts: FileFacts, *, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, JsonObject]]:
    """Each row's number, from 1, and values by column. Raises `DataError` when the file is damaged."""
    if facts.gzipped:  # parts of it could not be read
        raise refusal(facts.path, 0, "gzipped_parquet", "it is gzipped.", "Unpack it: Parquet is compressed already.")
    with open_packed(facts) as stream:
        try:
            table = pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        except _BROKEN as error:
            raise _damaged(facts, error) from None
        facts.columns = distinct(facts, table.schema_arrow.names, 1)
        _check_depth(facts, table.schema_arrow, limits.depth)
        has_structs = any(pa.types.is_nested(field.type) for field in table.schema_arrow)
        for record in _records(table, facts):
            facts.line += 1
            facts.rows += 1
            bad = record if isinstance(record, BadRow) else _finding(record, limits)
            if bad is not None:
                on_bad(facts.line, bad)
            elif not isinstance(record, BadRow):
                # Nested objects without nulls: a column gives every object the keys of all.
                yield facts.line, {k: _dense(v) for k, v in record.items()} if has_structs else record


def _check_depth(facts: FileFacts, schema: pa.Schema, depth: int) -> None:
    nesting, types = 1, [field.type for field in schema]
    while types := [kind.field(i).type for kind in types for i in range(kind.num_fields)]:
        nesting += 1
        if nesting > depth:
            message = f"its columns nest deeper than {depth}, which is data.limits.depth."
            raise refusal(facts.path, 1, "too_deep", message, "Flatten them, or raise the limit.")


def _records(table: pq.ParquetFile, facts: FileFacts) -> Iterator[JsonObject | BadRow]:
    metadata = table.metadata
    num_bytes = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    num_rows = max(1, min(MOST_ROWS, BATCH_BYTES // max(1, num_bytes // max(1, metadata.num_rows))))
    try:
        for batch in table.iter_batches(batch_size=num_rows, use_threads=False):
            facts.done_bytes = facts.total_bytes * facts.line // max(1, metadata.num_rows)
            try:
                yield from _without_nanoseconds(batch).to_pylist()
            except _UNHOLDABLE:
                yield from map(_one, (batch.slice(i, 1) for i in range(batch.num_rows)))
    except _BROKEN as error:
        raise _damaged(facts, error) from None


def _without_nanoseconds(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with nulls for nanoseconds, which Python's times lack. No time is text: none is ever used."""
    for i, field in enumerate(batch.schema):
        if getattr(field.type, "unit", "") == "ns":
            batch = batch.set_column(i, field.name, pa.nulls(batch.num_rows))
    return batch


def _one(batch: pa.RecordBatch) -> JsonObject | BadRow:
    """The row of a batch that may hold what Python cannot: text that is not UTF-8, a date before the year 1."""
    try:
        return _without_nanoseconds(batch).to_pylist()[0]  # type: ignore[no-any-return]
    except UnicodeDecodeError as error:
        message = f"byte 0x{error.object[error.start]:02X} of a text is not UTF-8"
        return BadRow("invalid_utf8", message, "Write the file again from the text.")
    except _UNHOLDABLE as error:
        return BadRow("wrong_type", f"one of its values cannot be read: {str(error)[:120]}", "Write it as text.")


def _finding(record: JsonObject, limits: Limits) -> BadRow | None:
    size = 0
    for text in strings(list(record.values())):
        size += len(text) if text.isascii() else len(text.encode())
        if "\0" in text:
            return nul_character(text.find("\0"))
    return too_long(size, limits.line_bytes) if size > limits.line_bytes else None


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_dense(item) for item in value]
    return value


def _damaged(facts: FileFacts, error: Exception) -> DataError:
    if isinstance(error, ConnectionError):
        return cannot_open(facts.path, error, facts.line + 1)
    reason = str(error).partition("\n")[0][:120]
    return refusal(
        facts.path, facts.line + 1, "damaged_parquet", f"the Parquet file is damaged ({reason}).", "Write it again."
    )
