"""What a file is, by its content, and a stream of its bytes. Its name decides only where the content does not."""

from __future__ import annotations

import difflib
import gzip
import os
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from tunesmith.data.findings import refusal
from tunesmith.data.kinds import BOM, GZIP, HEAD_BYTES, NAMED, SAVE_AS, Kind, kind_and_delimiter, suffix_of
from tunesmith.errors import DataError
from tunesmith.runs.atomic import storing
from tunesmith.types import Problem, Source

MOST_UNPACKED = 20
"""Times its size that a gzipped Parquet file may unpack to: Parquet is compressed already."""


@dataclass(slots=True)
class FileFacts:
    """What a file turned out to be, and how far it has been read."""

    path: str
    kind: Kind
    gzipped: bool = False
    has_bom: bool = False
    delimiter: str = ","
    """Between the values of a CSV file."""
    columns: tuple[str, ...] | None = None
    """Of a table, once its header is read."""
    line: int = 0
    """Lines read, or rows of a JSON array or Parquet file; of a document 1."""
    rows: int = 0
    """Rows read, those that cannot be used among them."""
    blank: int = 0
    """Blank lines, which are left out."""
    marks: int = 0
    """Lines of a CoNLL file that hold no word: -DOCSTART- and comments."""
    done_bytes: int = 0
    total_bytes: int = 0
    """Of the file as it lies on the disk."""
    at: str = ""
    """Where it is read, if not at its path."""

    def __str__(self) -> str:
        kind = {"\t": "TSV", ";": "CSV with semicolons"}.get(self.delimiter, "CSV") if self.kind == "CSV" else self.kind
        return f"{kind}, gzipped" if self.gzipped else kind


def distinct(facts: FileFacts, columns: Sequence[str], line: int) -> tuple[str, ...]:
    """The columns of a table. Raises `DataError` when two have one name."""
    if len(set(columns)) < len(columns):
        name = Counter(columns).most_common(1)[0][0][:60]
        raise refusal(facts.path, line, "duplicate_column", f"two columns are named {name!r}.", "Rename one.")
    return tuple(columns)


def look_at(path: str, at: str = "") -> tuple[FileFacts, list[Problem]]:
    """What a file is, and warnings where its name says otherwise. `at`: where it is read, if not at its path.

    Raises:
        DataError: it is missing, not a file, not readable, empty, an archive, or in no known format.
    """
    try:
        status = os.stat(at or path)
        if stat.S_ISDIR(status.st_mode):
            raise refusal(path, 1, "is_folder", "this is a folder.", "Give a file in it.")
        if not stat.S_ISREG(status.st_mode):
            raise refusal(path, 1, "not_a_file", "this is a device or a pipe, which can be read only once.", SAVE_AS)
        with open(at or path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except FileNotFoundError as error:
        if at in ("", path):
            raise cannot_open(path, error) from None
        message = f"this run was made with {at}, and it is not there now."
        raise refusal(path, 1, "no_such_file", message, "Put the file back there.") from None
    except OSError as error:
        raise cannot_open(path, error) from None
    except ValueError:  # a path with a NUL in it
        raise refusal(path, 1, "no_such_file", "there is no such file.", "Look at the path.") from None
    gzipped = head.startswith(GZIP)
    if gzipped:
        head = _unpacked_head(path, head)
    kind, delimiter = kind_and_delimiter(path, head)
    facts = FileFacts(path, kind, gzipped, head.startswith(BOM), delimiter, total_bytes=status.st_size, at=at)
    return facts, list(_misnamed(facts))


@contextmanager
def opened(facts: FileFacts) -> Iterator[Stream]:
    """The unpacked bytes of a text file, after its byte order mark. Raises `DataError` when it cannot be read."""
    with _packed(facts) as packed:
        stream = Stream(gzip.GzipFile(fileobj=packed) if facts.gzipped else packed, packed, facts)
        if facts.has_bom:
            stream.read(len(BOM))
        yield stream


@contextmanager
def opened_parquet(facts: FileFacts) -> Iterator[IO[bytes]]:
    """A Parquet file, unpacked to a temporary file where it is gzipped. Raises `DataError` when it cannot be read."""
    with _packed(facts) as packed:
        if not facts.gzipped:
            yield packed
            return
        with tempfile.TemporaryFile() as copy:
            stream = Stream(gzip.GzipFile(fileobj=packed), packed, facts)
            while block := stream.read(1 << 20):
                with storing(Path(tempfile.gettempdir()), num_bytes=copy.tell() + len(block)):
                    copy.write(block)
                if copy.tell() > MOST_UNPACKED * facts.total_bytes + HEAD_BYTES:
                    message = f"it unpacks to more than {MOST_UNPACKED} times its size."
                    fix = "Unpack it: Parquet is compressed already."
                    raise refusal(facts.path, 1, "unpacks_too_large", message, fix)
            copy.seek(0)
            yield copy


def _packed(facts: FileFacts) -> BinaryIO:
    try:
        return open(facts.at or facts.path, "rb")
    except OSError as error:
        raise cannot_open(facts.path, error) from None


class Stream:
    """Bytes of one file. Reading keeps `done_bytes` of its facts up to date and raises nothing but `DataError`."""

    LINES_A_LOOK = 64

    def __init__(self, unpacked: BinaryIO | gzip.GzipFile, packed: BinaryIO, facts: FileFacts) -> None:
        self._readline = unpacked.readline
        self._read = unpacked.read
        self._tell = packed.tell
        self._facts = facts
        self._until_look = 1

    def readline(self, size: int) -> bytes:
        """At most `size` bytes of what is left of a line."""
        self._until_look -= 1
        if not self._until_look:
            self._until_look = self.LINES_A_LOOK
            self._facts.done_bytes = self._tell()
        try:
            return self._readline(size)
        except (EOFError, zlib.error, OSError) as error:
            raise self._error(error) from None

    def read(self, size: int) -> bytes:
        self._facts.done_bytes = self._tell()
        try:
            return self._read(size)
        except (EOFError, zlib.error, OSError) as error:
            raise self._error(error) from None

    def _error(self, error: EOFError | zlib.error | OSError) -> DataError:
        line = self._facts.line + 1
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            return cannot_open(self._facts.path, error, line)
        return damaged_gzip(self._facts.path, line, error)


def cannot_open(path: str, error: OSError, line: int = 1) -> DataError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return refusal(path, line, "no_such_file", "there is no such file.", _near(path) or "Look at the path.")
    if isinstance(error, PermissionError):
        return refusal(path, line, "unreadable", "you may not read it.", "Change its permissions.")
    return refusal(path, line, "unreadable", f"it cannot be read: {error.strerror or error}.")


def _near(path: str) -> str:
    """The file of the same folder whose name is most like that of one that is not there."""
    folder, name = os.path.split(path)
    try:
        found = difflib.get_close_matches(name, os.listdir(folder or "."), n=1)
    except (OSError, ValueError):
        return ""
    return f"Did you mean {os.path.join(folder, found[0])}?" if found else ""


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


def _misnamed(facts: FileFacts) -> Iterator[Problem]:
    """Warnings: the name says another format than the content has, which was believed."""
    suffix = suffix_of(facts.path)
    is_tabs = facts.kind == "CSV" and facts.delimiter == "\t"
    expected = NAMED.get(suffix, (facts.kind,))
    if facts.kind not in expected or (suffix in (".tsv", ".csv") and is_tabs != (suffix == ".tsv")):
        yield _renamed(facts, f"the name ends in {suffix}, but this is {facts}, and was read as that.")
    if facts.gzipped != facts.path.lower().endswith(".gz"):
        is_packed = "is gzipped" if facts.gzipped else "is not gzipped"
        yield _renamed(facts, f"by its name one would not think so, but the file {is_packed}, and was read as that.")


def _renamed(facts: FileFacts, message: str) -> Problem:
    return Problem(Source(facts.path, 1), "misnamed", message, "Rename it.", severity="warning")
