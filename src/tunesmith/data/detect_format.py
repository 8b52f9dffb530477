"""The format of a file, detected by its first bytes, and a stream of its bytes.

The name of a file decides only between plain text and what looks like a table."""

from __future__ import annotations

import codecs
import gzip
import os
import re
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, BytesIO, RawIOBase
from typing import Any, Literal

from tunesmith.data.problems import refusal
from tunesmith.errors import DataError
from tunesmith.phrases import near_file
from tunesmith.recipe.schema import AS_IT_IS, Reading

ByteStream = BufferedIOBase
FileFormat = Literal["JSON lines", "JSON array", "CSV", "Excel", "Parquet", "CoNLL", "text"]

HEAD_BYTES = 64 * 1024
READ_BYTES = 128 * 1024
BOM = b"\xef\xbb\xbf"
GZIP = b"\x1f\x8b"
SAVE_AS = "Save it as JSON lines, CSV or Parquet, or a document as .txt."
DOCUMENTS = (".txt", ".text", ".md", ".markdown")
"""Ends of names of files that each hold one document."""

SUFFIXES: dict[str, tuple[FileFormat, ...]] = {
    ".jsonl": ("JSON lines",),
    ".ndjson": ("JSON lines",),
    ".json": ("JSON lines", "JSON array"),
    ".csv": ("CSV",),
    ".tsv": ("CSV",),
    ".xlsx": ("Excel",),
    ".xlsm": ("Excel",),
    ".parquet": ("Parquet",),
    ".conll": ("CoNLL",),
    ".bio": ("CoNLL",),
    ".iob": ("CoNLL",),
}
_ARCHIVES = (b"PK\x03\x04", b"7z\xbc\xaf", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd")
"""First bytes of files of zip (and so of Excel and Word), 7z, xz, bzip2 and zstd."""
_OLD_EXCEL = b"\xd0\xcf\x11\xe0"
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte order marks of other encodings than UTF-8, the longer ones first."""
_KNOWN_COLUMNS = {
    b"messages", b"conversations", b"instruction", b"output", b"prompt", b"completion", b"text", b"label", b"document",
    b"summary",
}  # fmt: skip
_CONTROLS = bytes(byte for byte in range(32) if byte < 9 or byte > 13)
_JSON_ROW = re.compile(rb'\{\s*["}]|\[\s*\{')
TAGGED = re.compile(rb"\S.*[ \t](?:O|[BIES]-\S+)")
"""A line of a CoNLL file that names spans: a word, and a tag that is O or begins as in IOB1, IOB2 and IOBES."""


def detect_format(path: str, head: bytes, suffixes: Sequence[str] = ()) -> tuple[FileFormat, str]:
    """Detect the format of a file, and the delimiter of a CSV. Raises `DataError` for other formats.

    A file named as a document, by one of `suffixes` too, is taken for one: problems of its text are problems of
    that row. So is text without a suffix, unless it is a table.
    """
    text = head.removeprefix(BOM).lstrip()
    if suffix_of(path) in (*DOCUMENTS, *suffixes) and not head.startswith(b"PAR1"):
        return _document(text)
    if head.startswith(b"PAR1"):
        return "Parquet", ","
    if reason := no_text(head):
        raise refusal(path, 0, *reason)
    if not text and len(head) < HEAD_BYTES:
        raise refusal(path, 0, "empty_dataset", "it holds no row.", "Give a file with rows.")
    if "CoNLL" in SUFFIXES.get(suffix_of(path), ()) or _is_tagged(text):
        return "CoNLL", " "
    if text[:1] in (b"{", b"", b"["):
        return ("JSON array" if text[:1] == b"[" else "JSON lines"), ","
    if not suffix_of(path) and not _num_controls(text) and not _is_table(text):
        return _document(text)
    return _table(path, text)


def _is_table(text: bytes) -> bool:
    """Whether the first lines have as many separators as the header, which has some."""
    delimiter, cells = _header(text)
    lines = [line for line in text.split(b"\n")[:20] if line.strip()]
    return len(cells) > 1 and len(lines) > 1 and all(line.count(delimiter.encode()) >= len(cells) - 1 for line in lines)


def no_text(head: bytes) -> tuple[str, str, str] | None:
    """Code, message and way out where bytes begin something else than UTF-8 text."""
    if head.startswith((*_ARCHIVES, GZIP)):
        return "archive", "this is an archive, or gzipped twice.", "Unpack it; save a sheet as CSV, a document as .txt."
    if head.startswith(_OLD_EXCEL):
        message = "this is an old Excel file (.xls, until 2003), or one with a password."
        return "binary", message, "Save it as .xlsx without a password, or the sheet as CSV."
    if head.startswith((b"{\0", b"[\0", b"\0{", b"\0[")):
        which = "le" if head[1:2] == b"\0" else "be"
        fix = f"Add --set data.encoding=utf-16-{which}, or save it as UTF-8."
        return "wrong_encoding", "this is UTF-16 without a byte order mark.", fix
    if head.startswith(b"%PDF") or _num_controls(head) > len(head) // 5:
        return "binary", "this is not text.", SAVE_AS
    return None


def is_text_file(place: str) -> bool:
    """Whether a file begins like text. Raises OSError, and DataError for a damaged gzip file."""
    with open(place, "rb") as file:
        head = file.read(HEAD_BYTES)
    head = _unpacked_head(place, head) if head.startswith(GZIP) else head
    return not (no_text(head) or head.startswith(b"PAR1"))


def suffix_of(path: str) -> str:
    """The end of a name, in small letters, before .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def is_about(name: str) -> bool:
    """Whether a document is about the data, rather than data."""
    return os.path.basename(name).lower().startswith(("readme", "license", "licence", "changelog", "citation"))


def _document(text: bytes) -> tuple[FileFormat, str]:
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
    """Whether lines are words with the tags of spans: three quarters of the lines read, and at least two."""
    words = [
        line.rstrip() for line in text.split(b"\n") if line.strip() and not line.startswith((b"-DOCSTART-", b"# "))
    ]
    return len(words) > 1 and sum(TAGGED.fullmatch(line) is not None for line in words) >= 0.75 * len(words)


def _table(path: str, text: bytes) -> tuple[FileFormat, str]:
    """CSV by its header; JSON lines that begin wrongly where the name says so; else a refusal."""
    named = SUFFIXES.get(suffix_of(path), ())
    if _num_controls(text) and not named:
        raise refusal(path, 0, "binary", "this is not text.", SAVE_AS)
    delimiter, cells = _header(text, prefer="\t" if suffix_of(path) == ".tsv" else ",")
    has_columns = len(cells) > 1
    if "JSON lines" in named and not (has_columns and _KNOWN_COLUMNS.intersection(cells)):
        return "JSON lines", ","
    if "CSV" in named or has_columns:
        return "CSV", delimiter
    message = f"it begins with {text[:30].decode('utf-8', 'replace')!r}, which is no JSON and no header of a table."
    raise refusal(path, 0, "unknown_format", message, SAVE_AS)


def _header(text: bytes, prefer: str = ",") -> tuple[str, list[bytes]]:
    """The most frequent delimiter of a table's first line, and the values between."""
    header = text.split(b"\n", 1)[0].rstrip(b"\r")
    counts = Counter({delimiter: header.count(delimiter.encode()) for delimiter in ",\t;"})
    delimiter = max(counts, key=lambda d: (counts[d], d == prefer))
    return delimiter, [cell.strip(b' "') for cell in header.split(delimiter.encode())]


def _num_controls(text: bytes) -> int:
    return len(text) - len(text.translate(None, _CONTROLS))


@dataclass(slots=True)
class FileFacts:
    """Format of a file, and how far it has been read."""

    path: str
    kind: FileFormat
    gzipped: bool = False
    has_bom: bool = False
    encoding: str = ""
    """Encoding of a text that may not be UTF-8; empty: UTF-8."""
    sheets: tuple[str, ...] = ()
    """Sheets of an Excel file, of which the first is read."""
    delimiter: str = ","
    """Between the values of a CSV file."""
    columns: tuple[str, ...] | None = None
    """Columns of a table, after its header is read."""
    line: int = 0
    """Lines read, or rows of a JSON array or Parquet file; of a document 1."""
    rows: int = 0
    """Rows read, those that cannot be used among them."""
    marks: int = 0
    """Lines of a CoNLL file that hold no word: -DOCSTART- and comments."""
    done_bytes: int = 0
    total_bytes: int = 0
    """Size on disk."""
    at: str = ""
    """Place where it is read, if not at its path."""
    skip_to: int = 0  # lines of JSON and CSV before this one are not looked at

    def __str__(self) -> str:
        kind = {"\t": "TSV", ";": "CSV with semicolons"}.get(self.delimiter, "CSV") if self.kind == "CSV" else self.kind
        sheet = [f"sheet {self.sheets[0]!r}"] if self.sheets else []
        encoding = [self.encoding] if self.encoding else []
        return ", ".join([kind, *sheet, *encoding, *(["gzipped"] if self.gzipped else [])])


def distinct(facts: FileFacts, columns: Sequence[str], line: int) -> tuple[str, ...]:
    """The columns of a table. Raises `DataError` when two have one name."""
    if len(set(columns)) < len(columns):
        name = Counter(columns).most_common(1)[0][0][:60]
        raise refusal(facts.path, line, "duplicate_column", f"two columns are named {name!r}.", "Rename one.")
    return tuple(columns)


def inspect_file(path: str, at: str = "", how: Reading = AS_IT_IS) -> FileFacts:
    """Detect the format of a file by its content. `at`: where it is read, if not at its path.

    Raises:
        DataError: it is missing, not a file, not readable, empty, an archive, or in no known format.
    """
    try:
        num_bytes = _size_of_file(path, at)
        with open(at or path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        if at in ("", path):
            raise cannot_open(path, error) from None
        message = f"this run was made with {at}, and it is not there now."
        raise refusal(path, 0, "no_such_file", message, "Put the file back there.") from None
    except OSError as error:
        raise cannot_open(path, error) from None
    except ValueError:  # a path with a NUL in it
        raise refusal(path, 0, "no_such_file", "there is no such file.", "Look at the path.") from None
    gzipped = head.startswith(GZIP)
    if gzipped:
        head = _unpacked_head(path, head)
    if head.startswith(_ARCHIVES[0]) and not gzipped and _is_workbook(at or path):
        return FileFacts(path, "Excel", total_bytes=num_bytes, at=at)
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    if how.encoding != "auto" and not encoding and not head.startswith((b"PAR1", BOM, *_ARCHIVES)):
        encoding = how.encoding
    if encoding:
        with _decodes(path, encoding):
            head = Recoded(BytesIO(head), encoding, is_whole=len(head) < HEAD_BYTES).readall()
    kind, delimiter = detect_format(path, head, how.suffixes)
    return FileFacts(path, kind, gzipped, head.startswith(BOM), encoding, (), delimiter, total_bytes=num_bytes, at=at)


def _is_workbook(place: str) -> bool:
    try:
        with zipfile.ZipFile(place) as parts:
            return "xl/workbook.xml" in parts.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


class Recoded(RawIOBase):
    """The bytes of a text in another encoding, as UTF-8. Where its first part that is not ASCII is UTF-8
    already, all stays as it is: a run's encoding counts for files that are not UTF-8.

    Raises UnicodeError for bytes that the encoding does not have.
    """

    def __init__(self, stream: ByteStream, encoding: str, *, is_whole: bool = True) -> None:
        self._stream, self._is_whole = stream, is_whole
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._has_nothing_in_common = "a".encode(encoding) != b"a"
        self._is_known, self._is_utf8, self._is_over, self._rest = False, False, False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._is_over:
            raw = self._stream.read(HEAD_BYTES)
            if not (self._is_known or self._has_nothing_in_common or raw.isascii()):
                raw += self._stream.read(4)  # whatever is cut off at the end of the part
                self._is_known, self._is_utf8 = True, _is_utf8(raw)
            self._is_over = not raw
            self._rest = raw if self._is_utf8 else self._decoder.decode(raw, not raw and self._is_whole).encode()
        part, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


def _is_utf8(raw: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(raw)
    except UnicodeDecodeError:
        return False
    return True


@contextmanager
def _decodes(path: str, encoding: str, facts: FileFacts | None = None) -> Iterator[None]:
    """Raise a text that does not have the encoding that was given as `DataError`."""
    try:
        yield
    except UnicodeError as error:  # of UTF-16 without a byte order mark it names no byte
        what = f"byte 0x{error.object[error.start]:02X}" if isinstance(error, UnicodeDecodeError) else "this"
        message = f"{what} is not {encoding}."
        line = facts.line + 1 if facts else 0
        raise refusal(path, line, "wrong_encoding", message, "Give its encoding by --set data.encoding=...") from None


def _size_of_file(path: str, at: str) -> int:
    status = os.stat(at or path)
    if stat.S_ISDIR(status.st_mode):
        raise refusal(path, 0, "is_folder", "this is a folder.", "Give a file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise refusal(path, 0, "not_a_file", "this is a device or a pipe, which can be read only once.", SAVE_AS)
    return status.st_size


@contextmanager
def open_text(facts: FileFacts) -> Iterator[tuple[ByteStream, BufferedReader]]:
    """The bytes of a text file after its byte order mark, unpacked, and the file that they are read from.

    Whatever cannot be read, then or later, is raised as a `DataError`.
    """
    with open_packed(facts) as packed:
        stream: ByteStream = gzip.GzipFile(fileobj=packed) if facts.gzipped else packed
        try:
            if facts.has_bom:
                stream.read(len(BOM))
            if facts.encoding:
                stream = BufferedReader(Recoded(stream, facts.encoding), HEAD_BYTES)
            with _decodes(facts.path, facts.encoding, facts):
                yield stream, packed
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise damaged_gzip(facts.path, facts.line + 1, error) from None
        except OSError as error:
            raise cannot_open(facts.path, error, facts.line + 1) from None


def open_packed(facts: FileFacts) -> BufferedReader:
    """A file as it is on disk. Raises `DataError` when it cannot be read."""
    try:
        return BufferedReader(open(facts.at or facts.path, "rb", buffering=0), READ_BYTES)
    except OSError as error:
        raise cannot_open(facts.path, error) from None


def cannot_open(path: str, error: OSError, line: int = 0) -> DataError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if os.path.islink(path):
            message = f"this is a link to {os.readlink(path)!r}, which is not there."
            return refusal(path, line, "no_such_file", message, "Correct the link, or put the file there.")
        way = near_file(path).strip() or _of_hub(path) or "Look at the path."
        return refusal(path, line, "no_such_file", "there is no such file.", way)
    if isinstance(error, PermissionError):
        return refusal(path, line, "unreadable", "you may not read it.", "Change its permissions.")
    return refusal(path, line, "unreadable", f"it cannot be read: {error.strerror or error}.")


def _of_hub(path: str) -> str:
    """The address that a path without a suffix may have been meant for."""
    is_like_one = re.fullmatch(r"[\w-][\w.-]*/[\w.-]*[\w-]", path) and not os.path.isdir(os.path.dirname(path))
    if not is_like_one or suffix_of(path) in SUFFIXES:
        return ""
    return f"Look at the path; a data set of the hub is hf://datasets/{path}."


def damaged_gzip(path: str, line: int, error: Exception) -> DataError:
    what = "is cut off" if isinstance(error, EOFError) else f"is damaged ({error})"
    return refusal(path, line, "damaged_gzip", f"the gzip file {what} here.", "Copy or download it again.")


def _unpacked_head(path: str, packed: bytes) -> bytes:
    try:
        unpacker = zlib.decompressobj(31)
        head = unpacker.decompress(packed, HEAD_BYTES)
    except zlib.error as error:
        raise damaged_gzip(path, 1, error) from None
    if not head and not unpacker.eof:
        raise damaged_gzip(path, 1, EOFError())
    return head
