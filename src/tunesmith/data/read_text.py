"""Plain text, a document a file; and CoNLL files, sentences of a word and its tag a line."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.detect_format import BOM, HEAD_BYTES, TAGGED, ByteStream, FileFacts, no_text
from tunesmith.data.read_json import BadRow, OnBadRow, decode, nul_character, rest_of_line, too_long
from tunesmith.recipe.schema import Limits


def document(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, dict[str, str]]]:
    """The one row of a file, byte for byte. What is wrong with it is a problem of that row."""
    raw = stream.read(limits.line_bytes + 1)
    while raw and len(raw) <= limits.line_bytes and (more := stream.read(limits.line_bytes + 1 - len(raw))):
        raw += more
    facts.line = facts.rows = 1
    offset = len(BOM) if facts.has_bom else 0
    try:
        if len(raw) > limits.line_bytes:
            size, limit = len(raw), limits.line_bytes
            while piece := stream.read(1 << 20):  # none of them held
                size += len(piece)
            message = f"the document has {size:,} bytes, more than data.limits.line_bytes, which is {limit:,}"
            raise BadRow("line_too_long", message, f"Split it, or set data.limits.line_bytes: {size}.")
        if reason := no_text(raw[:HEAD_BYTES]):
            code, message, fix = reason
            raise BadRow(code, message.rstrip("."), fix)
        if b"\0" in raw:
            raise nul_character(raw.find(b"\0"))
        yield 1, {"text": decode(raw)}
    except BadRow as bad:
        on_bad(1, bad, offset)


def conll_sentences(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """Each sentence's first line, its words (the first column) and tags (the last; none where there is one column).

    Columns are separated by tabs, or else by spaces. Lines of -DOCSTART-, which end a sentence, and comments
    before one are counted.
    """
    sentence = _Sentence(len(BOM) if facts.has_bom else 0)
    while True:
        raw = stream.readline(limits.line_bytes + 2)
        is_blank, is_mark = not raw.strip(), sentence.is_mark(raw)
        if sentence.size and (is_blank or is_mark):
            facts.rows += 1
            try:
                yield sentence.first, sentence.record(limits.line_bytes)
            except BadRow as bad:
                on_bad(sentence.first, bad, sentence.offset)
        elif raw and is_blank:
            facts.blank += 1
        if not raw:
            return
        facts.line += 1
        size = len(raw) + (rest_of_line(stream, raw) if len(raw) > limits.line_bytes and not is_blank else 0)
        if is_blank or is_mark:
            facts.marks += is_mark
            sentence.begin(size)
        else:
            sentence.add(raw, facts.line, size, limits.line_bytes)


class _Sentence:
    """The lines of a sentence as they are read; what is wrong with one is kept until its end."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        """Byte at which it begins."""
        self.first = 1
        """Line on which it begins."""
        self.size = 0
        self._words: list[str] = []
        self._tags: list[str] = []
        self._num_columns = 0
        """Columns of the lines before, in this sentence and earlier ones."""
        self._bad: BadRow | None = None

    def begin(self, skipped: int) -> None:
        """Forget this sentence. `skipped`: bytes between it and the next."""
        self.offset += self.size + skipped
        self.size = 0
        self._words, self._tags, self._bad = [], [], None

    def is_mark(self, raw: bytes) -> bool:
        """Whether a line holds no word: -DOCSTART-, or a comment, which has other columns than words have.

        Before any word was read, a comment is what does not end with the tag of a span.
        """
        if raw.startswith(b"-DOCSTART-"):
            return True
        if self.size or not raw.startswith(b"# "):
            return False
        if not self._num_columns:
            return TAGGED.fullmatch(raw.rstrip()) is None
        return len(_columns(raw)) != self._num_columns

    def add(self, raw: bytes, line: int, size: int, limit: int) -> None:
        if not self.size:
            self.first = line
        at, self.size = self.size, self.size + size
        if self._bad is not None or self.size > limit:
            return
        try:
            if b"\0" in raw:
                raise nul_character(raw.find(b"\0"))
            columns = [decode(column) for column in _columns(raw)]
            if self._num_columns and len(columns) != self._num_columns:
                message = f"line {line} has {len(columns)} columns, the lines before it have {self._num_columns}"
                raise BadRow(
                    "ragged_row", message, "Write a word and its tag on each line, a blank line between sentences."
                )
        except BadRow as bad:
            bad.at = None if bad.at is None else at + bad.at
            self._bad = bad
            return
        self._num_columns = len(columns)
        self._words.append(columns[0])
        self._tags += columns[1:][-1:]

    def record(self, limit: int) -> dict[str, list[str]]:
        """Raises `BadRow`."""
        if self.size > limit:
            raise too_long(self.size, limit)
        if self._bad is not None:
            raise self._bad
        return {"tokens": self._words, "tags": self._tags}


def _columns(raw: bytes) -> list[bytes]:
    line = raw.rstrip(b"\r\n")
    return line.split(b"\t") if b"\t" in line else line.split()
