"""JSON as it is written: what orjson lets pass in silence is refused here, and every refusal says where and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import orjson

DEEPEST = 250
"""Deepest nesting that orjson writes, and so the most that `limits.depth` can allow."""

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|[\[\]{}]', re.DOTALL)
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_NOT_NUMBERS = ("NaN", "Infinity", "-Infinity", "nan", "inf", "-inf")


class BadRow(Exception):
    """One row that cannot be read. `at` is the byte of the row where it shows, if it can be told."""

    def __init__(self, code: str, message: str, fix: str = "", *, at: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fix = fix
        self.at = at


def loads(raw: bytes, *, depth: int) -> Any:
    """The value of one JSON text.

    Raises:
        BadRow: it is not JSON, nests deeper than `depth`, names a key twice, or holds NaN, a NUL, a lone surrogate,
            or a whole number that cannot be kept exactly.
    """
    if raw.count(b"{") + raw.count(b"[") > depth:
        check_depth(raw, depth)
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _reason(raw, error) from None
    # A key that stands twice is the only thing that orjson reads and does not write again.
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
                raise BadRow(
                    "too_deep",
                    f"it nests deeper than {allowed}, which is "
                    + ("data.limits.depth" if depth <= DEEPEST else "the deepest that can be read"),
                    "Flatten the row" + (", or raise the limit." if depth < DEEPEST else "."),
                    at=match.start(),
                )
        elif mark in (b"}", b"]"):
            now -= 1


def decode(raw: bytes) -> str:
    """Text of UTF-8 bytes, never repaired. Raises `BadRow` with the first byte that is not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise invalid_utf8(raw, error.start) from None


def invalid_utf8(raw: bytes, at: int) -> BadRow:
    byte = raw[at]
    around = raw[max(0, at - 12) : at + 12].decode("latin-1")
    if byte == 0xED and raw[at + 1 : at + 2] >= b"\xa0":
        fix = "It is half of a UTF-16 pair: have the program that wrote it write UTF-8."
    elif 0xC2 <= byte <= 0xF4 and (at + 1 == len(raw) or 0x80 <= raw[at + 1] <= 0xBF):
        fix = "A character is cut off: take the text from where it was whole."
    else:
        fix = (
            f"Read as Latin-1 (Windows-1252) it says {around!r}. "
            "If that is right, convert the file: iconv -f WINDOWS-1252 -t UTF-8."
        )
    return BadRow("invalid_utf8", f"byte 0x{byte:02X} is not UTF-8", fix, at=at)


def nul_character(at: int) -> BadRow:
    return BadRow("nul_character", "its text holds a NUL character, which no model can read", "Remove it.", at=at)


def strings(value: Any) -> Iterable[str]:
    """Every string in a JSON value, keys included."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting.extend(one)
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _num_quotes(raw: bytes) -> int:
    """Quotes that open or close a string: two a key, two a string."""
    quotes = raw.count(b'"')
    if b"\\" in raw:
        quotes -= raw.replace(b"\\\\", b"").count(b'\\"')
    return quotes


def _duplicate_key(raw: bytes) -> BadRow:
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(kept := dict(pairs)) < len(pairs):
            twice.append(Counter(key for key, _ in pairs).most_common(1)[0][0])
        return kept

    json.loads(raw, object_pairs_hook=collect)
    name = repr(twice[0][:60]) if twice else "a key"
    return BadRow("duplicate_key", f"{name} stands twice in one object", "Keep one of them.")


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
    """What is wrong with a text that orjson refuses."""
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
    if "surrogate" in reason:
        message = f"{text[pos - 1 : pos + 5]!r} is half of a character"
        return "lone_surrogate", message, "Have the program that wrote it write both halves, or UTF-8."
    if "infinity" in reason:
        return "not_a_number", f"{rest[:12]}… is too large a number", "Write it as text, or leave it out."
    if rest.startswith(_NOT_NUMBERS):
        return "not_a_number", f"{rest[:12]!r} is not a number in JSON", "Leave it out."
    if "end of data" in reason or pos >= len(text.rstrip()):
        message = f"the row stops before its end: …{text.rstrip()[-40:]!r}"
        return "truncated_json", message, "A row of JSON lines stands on one line. If it does, export the file again."
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
        return "A byte order mark stands in the middle of the file: remove it."
    if rest.startswith("{"):
        return "One row a line."
    return ""
