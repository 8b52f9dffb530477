"""What a file is, by its first bytes. Its name decides only between plain text and what looks like a table."""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Literal

from tunesmith.data.findings import refusal

Kind = Literal["JSON lines", "JSON array", "CSV", "Parquet", "CoNLL", "text"]

HEAD_BYTES = 64 * 1024
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
DOCUMENTS = (".txt", ".text", ".md", ".markdown")
"""Ends of names of files that each hold one document."""

NAMED: dict[str, tuple[Kind, ...]] = {
    ".jsonl": ("JSON lines",),
    ".ndjson": ("JSON lines",),
    ".json": ("JSON lines", "JSON array"),
    ".csv": ("CSV",),
    ".tsv": ("CSV",),
    ".parquet": ("Parquet",),
    ".conll": ("CoNLL",),
    ".bio": ("CoNLL",),
    ".iob": ("CoNLL",),
}
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive (or an Excel or Word file)",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\xfd7zXZ\x00": "an xz file",
    b"BZh": "a bzip2 file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    GZIP: "gzipped twice",
}
_SHEET, _LETTER = "Save the sheet as CSV (UTF-8).", "Save the text as .txt (UTF-8)."
_OFFICE = {
    **dict.fromkeys((".xlsx", ".xlsm", ".xls", ".ods"), _SHEET),
    **dict.fromkeys((".docx", ".doc", ".odt", ".rtf"), _LETTER),
}
"""What to do with files of an office program, by the ends of their names."""
_OTHER_BINARIES = {
    b"ARROW1\x00\x00": "an Arrow file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x80\x04\x95": "a Python pickle",
}
_KNOWN_COLUMNS = {
    b"messages", b"conversations", b"instruction", b"output", b"prompt", b"completion", b"text", b"label", b"document",
    b"summary",
}  # fmt: skip
SAVE_AS = "Save it as JSON lines, CSV or Parquet, or a document as .txt."
_CONTROLS = bytes(byte for byte in range(32) if byte < 9 or byte > 13)
_JSON_ROW = re.compile(rb'\{\s*["}]|\[\s*\{')
TAGGED = re.compile(rb"\S.*[ \t](?:O|[BIES]-\S+)")
"""A line of a CoNLL file that names spans: a word, and a tag that is O or begins as in IOB1, IOB2 and IOBES."""


def kind_and_delimiter(path: str, head: bytes) -> tuple[Kind, str]:
    """What a file is, and what stands between the values of a CSV. Raises `DataError` for what cannot be read.

    A document is believed to be one: what is wrong with its text is a problem of that row.
    """
    text = head.removeprefix(BOM).lstrip()
    if suffix_of(path) in DOCUMENTS and not head.startswith(b"PAR1"):
        return _document(text)
    if head.startswith(b"PAR1"):
        return "Parquet", ","
    if reason := no_text(head):
        code, message, fix = reason
        raise refusal(path, 1, code, message, _OFFICE.get(suffix_of(path), fix))
    if not text and len(head) < HEAD_BYTES:
        raise refusal(path, 1, "empty_dataset", "it holds no row.")
    if "CoNLL" in NAMED.get(suffix_of(path), ()) or _is_tagged(text):
        return "CoNLL", " "
    if text[:1] in (b"{", b""):
        return "JSON lines", ","
    if text[:1] == b"[":
        return "JSON array", ","
    return _table(path, text)


def no_text(head: bytes) -> tuple[str, str, str] | None:
    """Code, message and way out where bytes are those of something else than UTF-8 text."""
    for magic, what in {**_ARCHIVES, **_OTHER_BINARIES}.items():
        if head.startswith(magic):
            is_archive = magic in _ARCHIVES
            return (
                ("archive" if is_archive else "binary"),
                f"this is {what}.",
                ("Unpack it." if is_archive else SAVE_AS),
            )
    if head[257:262] == b"ustar":
        return "archive", "this is a tar archive.", "Unpack it."
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"[\0", b"\0{", b"\0[")):
        fix = "Save it as UTF-8, or: iconv -f UTF-16 -t UTF-8 in > out."
        return "wrong_encoding", "this is UTF-16.", fix
    if _num_controls(head) > len(head) // 5:
        return "binary", "this is not text.", SAVE_AS
    return None


def suffix_of(path: str) -> str:
    """The end of a name, in small letters, before .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _document(text: bytes) -> tuple[Kind, str]:
    """Text, unless it is rows without doubt: those are often named .txt too."""
    if _JSON_ROW.match(text):
        return ("JSON lines" if text.startswith(b"{") else "JSON array"), ","
    if _is_tagged(text):
        return "CoNLL", " "
    delimiter, cells = _header(text)
    if len(_KNOWN_COLUMNS.intersection(cells)) >= 2:
        return "CSV", delimiter
    return "text", ","


def _is_tagged(text: bytes) -> bool:
    """Whether lines are words with the tags of spans: three quarters of those that were read, and at least two."""
    words = [
        line.rstrip() for line in text.split(b"\n") if line.strip() and not line.startswith((b"-DOCSTART-", b"# "))
    ]
    return len(words) > 1 and sum(TAGGED.fullmatch(line) is not None for line in words) >= 0.75 * len(words)


def _table(path: str, text: bytes) -> tuple[Kind, str]:
    """CSV by its header; JSON lines that begin wrongly where the name says so; else a refusal."""
    named = NAMED.get(suffix_of(path), ())
    if _num_controls(text) and not named:
        raise refusal(path, 1, "binary", "this is not text.", SAVE_AS)
    delimiter, cells = _header(text, prefer="\t" if suffix_of(path) == ".tsv" else ",")
    has_columns = len(cells) > 1
    if "JSON lines" in named and not (has_columns and _KNOWN_COLUMNS.intersection(cells)):
        return "JSON lines", ","
    if "CSV" in named or has_columns:
        return "CSV", delimiter
    message = f"it begins with {text[:30].decode('utf-8', 'replace')!r}, which is no JSON and no header of a table."
    raise refusal(path, 1, "unknown_format", message, SAVE_AS)


def _header(text: bytes, prefer: str = ",") -> tuple[str, list[bytes]]:
    """What stands between the values of a table's first line most often, and those values."""
    header = text.split(b"\n", 1)[0].rstrip(b"\r")
    counts = Counter({delimiter: header.count(delimiter.encode()) for delimiter in ",\t;"})
    delimiter = max(counts, key=lambda d: (counts[d], d == prefer))
    return delimiter, [cell.strip(b' "') for cell in header.split(delimiter.encode())]


def _num_controls(text: bytes) -> int:
    return len(text) - len(text.translate(None, _CONTROLS))
