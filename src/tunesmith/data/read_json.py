"""JSON lines and JSON arrays, one row at a time in memory, and strict JSON: what orjson accepts silently is
refused here, with place and reason."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import orjson

from tunesmith.data.detect_format import ByteStream, FileFacts, open_text
from tunesmith.data.problems import refusal
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Limits
from tunesmith.types import JsonObject

DEEPEST = 250
"""Deepest nesting that orjson writes, and so the most that `limits.depth` can allow."""

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[0-9][0-9]{18}")  # begins with one digit, which `re` looks for much faster
_NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf")


class BadRow(Exception):
    """A row that cannot be read. `at`: the byte of the row with the problem, if known."""

    def __init__(self, code: str, message: str, fix: str = "", *, at: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix
        self.at = at


def strings(value: Any) -> Iterable[str]:
    """Every string in a JSON value, keys included."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            waiting += [*item, *item.values()][::-1]
        elif isinstance(item, list):
            waiting += item[::-1]


def loads(raw: bytes, *, depth: int) -> Any:
    """The value of one JSON text.

    Raises:
        BadRow: it is not JSON, nests deeper than `depth`, names a key twice, or holds NaN, a NUL, a lone
            surrogate, or a whole number that cannot be kept exactly.
    """
    if raw.count(b"{") + raw.count(b"[") > depth:
        check_depth(raw, depth)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _reason(raw, error) from None
    # A repeated key is the only thing that orjson reads and does not write again.
    if _num_quotes(raw) != _num_quotes(orjson.dumps(value)):
        raise _duplicate_key(raw)
    if b"\\u0000" in raw and any("\0" in text for text in strings(value)):
        raise nul_character(raw.find(b"\\u0000"))
    _check_numbers(raw)
    return value


def check_depth(raw: bytes, depth: int) -> None:
    """Raise `BadRow` when objects and arrays nest deeper than `depth`, before any parser sees them."""
    allowed = min(depth, DEEPEST)
    now = 0
    for match in _STRING_OR_BRACKET.finditer(raw):
        mark = match.group()
        if mark in (b"{", b"["):
            now += 1
            if now > allowed:
                fix = f"Flatten the row, or raise data.limits.depth ({DEEPEST} at most)."
                raise BadRow("too_deep", f"it nests deeper than {allowed}", fix, at=match.start())
        elif mark in (b"}", b"]"):
            now -= 1


def decode(raw: bytes) -> str:
    """Text of UTF-8 bytes, never repaired. Raises `BadRow` with the first byte that is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        at = error.start
        around = raw[max(0, at - 12) : at + 12].decode("cp1252", "replace")
        fix = f"Read as Windows-1252 it says {around!r}. If that is right, add --set data.encoding=cp1252."
        raise BadRow("invalid_utf8", f"byte 0x{raw[at]:02X} is not UTF-8", fix, at=at) from None


def nul_character(at: int) -> BadRow:
    return BadRow("nul_character", "its text holds a NUL character, which no model can read", "Remove it.", at=at)


def _num_quotes(raw: bytes) -> int:
    """Quotes that open or close a string: two a key, two a string."""
    quotes = raw.count(b'"')
    if b"\\" in raw:
        quotes -= raw.replace(b"\\\\", b"").count(b'\\"')
    return quotes


def _duplicate_key(raw: bytes) -> BadRow:
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> JsonObject:
        if len(unique := dict(pairs)) < len(pairs):
            twice.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return unique

    json.loads(raw, object_pairs_hook=collect)
    name = repr(twice[0][:60]) if twice else "a key"
    return BadRow("duplicate_key", f"{name} is there twice in one object", "Keep one of them.")


def _check_numbers(raw: bytes) -> None:
    """Refuse whole numbers beyond 64 bits, which orjson rounds: two classes would become one."""
    if _LONG_NUMBER.search(raw) is None:
        return

    def exact(digits: str) -> int:
        if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
            raise BadRow(
                "number_too_large", f"{digits[:40]} does not fit in 64 bits and would be rounded", "Write it as text."
            )
        return int(digits)

    json.loads(raw, parse_int=exact)


def _reason(raw: bytes, error: orjson.JSONDecodeError) -> BadRow:
    """The reason why orjson refuses a text."""
    try:
        text = decode(raw)
    except BadRow as bad:
        return bad
    if "\0" in text:
        return nul_character(raw.find(b"\0"))
    code, message, fix = _finding(text, error.pos, error.msg)
    return BadRow(code, message, fix, at=len(text[: error.pos].encode()))


def _finding(text: str, pos: int, reason: str) -> tuple[str, str, str]:
    rest = text[pos:]
    number = re.match(r"[-+.\w]*", text[pos - text[:pos].endswith("-") :])[0]  # type: ignore[index]
    number = number if len(number) <= 24 else f"{number[:24]}…"
    if "surrogate" in reason:
        message = f"{text[pos - 1 : pos + 5]!r} is half of a character"
        return "lone_surrogate", message, "Have the program that wrote it write both halves, or UTF-8."
    if "infinity" in reason:
        return "not_a_number", f"{number} is too large a number", "Write it as text, or leave it out."
    if rest.startswith(_NOT_NUMBERS):
        return "not_a_number", f"{number} is not a number in JSON", "Leave it out."
    if "end of data" in reason or "Unterminated" in reason or pos >= len(text.rstrip()):
        message = f"it stops before its end: …{text.rstrip()[-40:]!r}"
        return "truncated_json", message, "A row of JSON lines is on one line. If it is, export the file again."
    return "bad_json", f"not JSON: {reason}, {_around(text, pos)}", _hint(rest, reason)


def _around(text: str, pos: int) -> str:
    return f"near {text[max(0, pos - 15) : pos + 25].strip()!r}"


def _hint(rest: str, reason: str) -> str:
    if "control character" in reason:
        return "Inside text, write a line break as \\n and a tab as \\t."
    if rest.startswith("'"):
        return "JSON takes double quotes only."
    if rest.startswith(("True", "False", "None")):
        return "That is Python: JSON has true, false and null. Write the file with json.dumps."
    if rest.startswith("\ufeff") or "BOM" in reason:
        return "A byte order mark is in the middle of the file: remove it."
    if rest.startswith("{"):
        return "One row a line."
    return ""


OnBadRow = Callable[[int, BadRow], None]
"""Gets the line of a row and its problem."""

JSON_CHUNK_BYTES = 256 * 1024
MOST_INDENTED_BYTES = 2**26
"""The most of a file that is read at once to see whether all its lines make one object."""
MOST_BLANK = 1_000_000
MOST_ARRAY_BYTES = 2**30
"""A JSON array is held whole while its rows are read, unlike JSON lines."""


def json_lines(stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, Any]]:
    """Each line's number and value; blank lines are left out."""
    limit, depth, num_blank = limits.line_bytes, limits.depth, 0
    while raw := stream.readline(limit + 2):
        facts.line += 1
        if len(raw) > limit and len(raw.rstrip(b"\r\n")) > limit:
            size = len(raw) + rest_of_line(stream, raw)
            facts.rows += 1
            on_bad(facts.line, too_long(size, limit))
            continue
        if raw.isspace():
            num_blank = count_blank(num_blank, facts)
            continue
        facts.rows, num_blank = facts.rows + 1, 0
        try:
            yield facts.line, loads(raw, depth=depth)
        except BadRow as bad:
            if facts.rows == 1 and bad.code == "truncated_json":
                _refuse_indented(facts)
            on_bad(facts.line, bad)
        if facts.skip_to > facts.line + 1:
            facts.line += skip_lines(stream, facts.skip_to - 1 - facts.line)


def skip_lines(stream: ByteStream, num: int) -> int:
    """Go on behind `num` ends of lines, at the speed of the disk: nothing is looked at but these. Returns how
    many there were before the end of the file."""
    num_skipped = 0
    while num_skipped < num and (piece := stream.peek(1)):  # type: ignore[attr-defined]
        num_here = int(np.count_nonzero(np.frombuffer(piece, np.uint8) == ord("\n")))  # twice as fast as bytes.count
        if num_skipped + num_here < num:
            num_skipped += num_here
            stream.read(len(piece))
            continue
        end = 0
        for _ in range(num - num_skipped):
            end = piece.index(b"\n", end) + 1
        stream.read(end)
        return num
    return num_skipped


def count_blank(num: int, facts: FileFacts) -> int:
    """One blank line more than `num` since the last row. Raises `DataError` after `MOST_BLANK`: a packed file
    of a megabyte can hold a thousand million."""
    if num < MOST_BLANK:
        return num + 1
    message = f"more than {MOST_BLANK:,} lines before it are blank."
    raise refusal(facts.path, facts.line, "blank_lines", message, "Remove them. Nothing after it was read.")


def _refuse_indented(facts: FileFacts) -> None:
    """Raise `DataError` for a file that is one object on several lines."""
    with open_text(facts) as (stream, _):
        try:
            content = orjson.loads(stream.read(MOST_INDENTED_BYTES))
        except orjson.JSONDecodeError:
            return
    if not isinstance(content, dict):
        return
    of_a_row = ("messages", "conversations", "tools")
    lists = [key for key, value in content.items() if isinstance(value, list) and key not in of_a_row]
    lists = [key for key in lists if content[key] and all(isinstance(row, dict) for row in content[key])]
    place = "FILE" if "://" in facts.path else facts.path
    load = f"json.load({'gzip.' * facts.gzipped}open({place!r}, 'rb'))"
    fix, code = "If it is one row, write it on one line:", f"print(json.dumps({load}))"
    if len(lists) == 1:
        fix = f"If the rows are its list {lists[0]!r}, put that alone into a file:"
        code = f"[print(json.dumps(row)) for row in {load}[{lists[0]!r}]]"
    out = shlex.quote(f"{os.path.splitext(os.path.basename(place))[0]}-rows.jsonl")
    way = f"{fix} python -c {shlex.quote(f'import gzip, json; {code}')} > {out}"
    raise refusal(facts.path, 0, "indented_object", "this is one indented object, not JSON lines.", way)


def rest_of_line(stream: ByteStream, raw: bytes) -> int:
    """Skip to the end of a line of which `raw` was read. Returns the number of bytes skipped."""
    size = 0
    while raw and not raw.endswith(b"\n"):
        raw = stream.readline(JSON_CHUNK_BYTES)
        size += len(raw)
    return size


def too_long(size: int, limit: int) -> BadRow:
    return BadRow(
        "line_too_long",
        f"its {size:,} bytes are more than data.limits.line_bytes, which is {limit:,}",
        "Split it, or raise the limit.",
    )


def json_array(stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, Any]]:
    """Each element's number, from 1, and value.

    Raises `DataError` where the array is not JSON: nothing then says where the next row begins.
    """
    for raw in _elements(stream, facts):
        facts.rows += 1
        try:
            if len(raw) > limits.line_bytes:
                raise too_long(len(raw), limits.line_bytes)
            yield facts.line, loads(raw, depth=limits.depth)
        except BadRow as bad:
            on_bad(facts.line, bad)


_SCANNER = json.JSONDecoder(parse_int=str, parse_float=str, strict=False)
_SPACE = re.compile(r"[ \t\n\r]*")
_COPY_AGAIN = "Copy or export the file again."


def _elements(stream: ByteStream, facts: FileFacts) -> Iterator[bytes]:
    """The elements of an array, each counted as a line of the file."""
    text = stream.read(MOST_ARRAY_BYTES + 1).decode("latin-1")  # a character a byte
    if len(text) > MOST_ARRAY_BYTES:
        message = f"the array has more than {MOST_ARRAY_BYTES:,} bytes, which is the most that is held at once."
        raise refusal(facts.path, 0, "array_too_large", message, "Write it as JSON lines, one object a line.")
    at, mark = text.index("["), ","

    def skip(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]

    if text.startswith("]", skip(at + 1)):
        at, mark = skip(at + 1), "]"
    while mark == ",":
        facts.line += 1
        begin = skip(at + 1)
        try:
            _, end = _SCANNER.raw_decode(text, begin)
        except RecursionError:
            raise _broken(facts, begin, "too_deep", "it nests too deeply.", "Flatten the row.") from None
        except json.JSONDecodeError as error:
            before = _readable(text[begin : error.pos])
            here = before + _readable(text[error.pos : error.pos + 99])
            code, message, fix = _finding(here, len(before), error.msg)
            if code == "truncated_json":
                fix = _COPY_AGAIN
            elif text[begin] in ",]" or (text[error.pos] in "]}" and before.rstrip().endswith(",")):
                fix = "Remove the comma."
            raise _broken(facts, error.pos, code, f"{message}.", fix) from None
        yield text[begin:end].encode("latin-1")
        at = skip(end)
        mark = text[at : at + 1]
    if not mark:
        raise _broken(facts, at, "truncated_json", "the array is not closed.", _COPY_AGAIN)
    if mark != "]":
        raise _broken(facts, at, "bad_json", "no comma follows the row.", "Write one between rows.")
    if rest := text[at + 1 :].strip(" \t\n\r\v\f"):
        facts.line += 1
        message = f"{_readable(rest[:20])!r} follows the end of the array."
        fix = "Several arrays in one file: join them, or write one object a line."
        raise refusal(facts.path, facts.line, "trailing_data", message, fix)


def _readable(latin: str) -> str:
    return latin.encode("latin-1").decode("utf-8", "replace")


def _broken(facts: FileFacts, at: int, code: str, message: str, fix: str = "") -> DataError:
    place = f"{message.removesuffix('.')} (byte {at + 1 + 3 * facts.has_bom:,})."
    return refusal(facts.path, facts.line, code, place, f"{fix} Nothing after it was read.".strip())
