"""Plain text, a document a file; and CoNLL files, sentences of a word and its tag a line."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.detect_format import HEAD_BYTES, TAGGED, ByteStream, FileFacts, no_text
from tunesmith.data.problems import refusal
from tunesmith.data.read_json import BadRow, OnBadRow, decode, nul_character
from tunesmith.recipe.schema import Limits


def document(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, dict[str, str]]]:
    """The one row of a file, byte for byte. What is wrong with it is a problem of that row."""
    raw = stream.read(limits.line_bytes + 1)
    while raw and len(raw) <= limits.line_bytes and (more := stream.read(limits.line_bytes + 1 - len(raw))):
        raw += more
    facts.line = facts.rows = 1
    try:
        if len(raw) > limits.line_bytes:
            message = f"the document has more than data.limits.line_bytes, which is {limits.line_bytes:,}"
            raise BadRow("line_too_long", message, "Split it, or raise the limit.")
        if reason := no_text(raw[:HEAD_BYTES]):
            code, message, fix = reason
            raise BadRow(code, message.rstrip("."), fix)
        if b"\0" in raw:
            raise nul_character(raw.find(b"\0"))
        yield 1, {"text": decode(raw)}
    except BadRow as bad:
        on_bad(1, bad)


def conll_sentences(
    stream: ByteStream, facts: FileFacts, *, limits: Limits, on_bad: OnBadRow
) -> Iterator[tuple[int, dict[str, list[str]]]]:
    """Each sentence's first line, its words (the first column) and tags (the last of several).

    Columns are separated by tabs, or else by spaces. Lines of -DOCSTART-, which end a sentence, and comments
    before one are counted.
    """
    sentence: list[bytes] = []
    first, num_columns, size = 1, 0, 0
    is_over = False
    while not is_over:
        raw = stream.readline(limits.line_bytes + 2)
        is_over, is_blank = not raw, not raw.strip()
        facts.line += not is_over
        is_mark = not is_blank and _is_mark(raw, num_columns, is_first=not sentence)
        if not (is_blank or is_mark):
            first = first if sentence else facts.line
            sentence.append(raw)
            size += len(raw)
            if size > limits.line_bytes:
                message = f"its sentence has more than {limits.line_bytes:,} bytes, which is data.limits.line_bytes."
                fix = "Write a blank line between sentences. Nothing after it was read."
                raise refusal(facts.path, first, "line_too_long", message, fix)
            continue
        facts.marks += is_mark
        if sentence:
            facts.rows += 1
            try:
                record, num_columns = _sentence(sentence, first, num_columns)
                yield first, record
            except BadRow as bad:
                on_bad(first, bad)
        sentence, size = [], 0


def _is_mark(raw: bytes, num_columns: int, *, is_first: bool) -> bool:
    """Recognize a line without a word: -DOCSTART-, or a comment, which has other columns than words have.

    Before any word was read, a comment is what does not end with the tag of a span.
    """
    if not is_first or not raw.startswith(b"# "):
        return raw.startswith(b"-DOCSTART-")
    return len(_columns(raw)) != num_columns if num_columns else TAGGED.fullmatch(raw.rstrip()) is None


def _sentence(lines: list[bytes], first: int, num_columns: int) -> tuple[dict[str, list[str]], int]:
    """Words and tags of a sentence, and its number of columns, the same in every sentence. Raises `BadRow`."""
    words, tags, at = [], [], 0
    for number, raw in enumerate(lines, start=first):
        try:
            if b"\0" in raw:
                raise nul_character(raw.find(b"\0"))
            columns = [decode(column) for column in _columns(raw)]
        except BadRow as bad:
            bad.at = None if bad.at is None else at + bad.at
            raise
        if num_columns and len(columns) != num_columns:
            message = f"line {number} has {len(columns)} columns, the lines before it have {num_columns}"
            fix = "Write a word and its tag on each line, a blank line between sentences."
            raise BadRow("ragged_row", message, fix)
        num_columns = len(columns)
        words.append(columns[0])
        tags += columns[1:][-1:]
        at += len(raw)
    return {"tokens": words, "tags": tags}, num_columns


def _columns(raw: bytes) -> list[bytes]:
    line = raw.rstrip(b"\r\n")
    return line.split(b"\t") if b"\t" in line else line.split()
