"""Rows to be answered: of a file, of a pipe as they arrive, or at hand."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import BufferedIOBase
from typing import Any, cast

from tunesmith.data.examples import FileExamples, examples
from tunesmith.data.findings import kind_of, refusal
from tunesmith.data.kinds import BOM
from tunesmith.data.opening import FileFacts, Stream
from tunesmith.data.read_text import json_lines, rest_of_line, too_long
from tunesmith.data.strict_json import BadRow
from tunesmith.inference.lines import Line, Lines, record_of
from tunesmith.inference.predictor import Predictor
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.types import Problem, Source, TaskName

PIPE = "stdin"
"""What a pipe is called as a source."""
AT_HAND = "rows"


def read_file(
    path: str, data: Data, task: TaskName, lines: Lines, facts: list[FileFacts], *, keep: Sequence[str] = ()
) -> None:
    """Hand every row of a file to `lines`, with the fields `keep`; `data` says the names of columns and the limits.

    Raises DataError where the file, or what is left of it, cannot be read.
    """
    files, how = [DataFile(path=path)], cast(Any, {"task": task, "answered": False, "keep": keep})
    for _, example in examples(files, data, lines.hear, facts=facts, **how):
        lines.take(example)


def read_records(
    records: Iterable[tuple[int, Any]],
    data: Data,
    task: TaskName,
    lines: Lines,
    *,
    facts: FileFacts,
    keep: Sequence[str] | None = None,
) -> None:
    """The same for numbered rows that are read already."""
    of_file = FileExamples(facts, data, lines.hear, task, answered=False, keep=keep)
    for number, record in records:
        source = Source(facts.path, number)
        if not isinstance(record, dict):
            message = f"the row is {kind_of(record)}, not an object with named fields."
            lines.hear(Problem(source, "not_an_object", message, 'Write {"text": ..., ...}.'))
            continue
        example = of_file.example(record, source)
        if example is not None:
            lines.take(example)
    of_file.finish()


def read_pipe(
    source: BufferedIOBase,
    data: Data,
    task: TaskName,
    lines: Lines,
    say: Callable[[str], None],
    *,
    keep: Sequence[str] = (),
) -> None:
    """Hand every row of a pipe to `lines`, and have those that are there answered before waiting for more.

    JSON lines; or plain lines, each one text, where the first is no JSON object: `say` is told so.
    """
    pipe = _Pipe(source, lines.flush)
    reader = io.BufferedReader(pipe, 1 << 16)
    head = reader.peek(1)
    facts = FileFacts(PIPE, "JSON lines", has_bom=head.startswith(BOM))
    if facts.has_bom:
        reader.read(len(BOM))
    stream = Stream(cast(Any, reader), cast(Any, pipe), facts)
    is_json = head.removeprefix(BOM).lstrip()[:1] in (b"{", b"")
    if not is_json:
        say("stdin: its first line is no JSON object: each line is read as one text")

    def on_bad(line: int, bad: BadRow, begin: int) -> None:
        lines.hear(Problem(Source(PIPE, line), bad.code, f"{bad.message}.", bad.fix))

    if is_json:
        records: Iterator[tuple[int, Any]] = json_lines(stream, facts, limits=data.limits, on_bad=on_bad)
    else:
        texts = _plain_lines(stream, facts, limits=data.limits, on_bad=on_bad)
        records = ((number, record_of(task, text)) for number, text in texts)
    read_records(records, data, task, lines, facts=facts, keep=keep)
    if facts.rows == 0:
        raise refusal(PIPE, 1, "empty_dataset", "it holds no row.")


def read_rows(rows: Iterable[str | Mapping[str, Any]], data: Data, task: TaskName, lines: Lines) -> None:
    """Hand texts, or rows with named fields, to `lines`."""
    records = (record_of(task, row) if isinstance(row, str) else dict(row) for row in rows)
    read_records(enumerate(records, start=1), data, task, lines, facts=FileFacts(AT_HAND, "JSON lines"))


def answers_to(predictor: Predictor, rows: Iterable[str | Mapping[str, Any]], *, bare: bool = False) -> list[Line]:
    """A line for each of some rows at hand, without a source: their order says which is which."""
    found: list[Line] = []
    lines = Lines(predictor, found.extend, chunk_rows=predictor.chunk_rows, bare=bare)
    read_rows(rows, predictor.speaker.recipe.data, predictor.task, lines)
    lines.flush()
    return [{name: value for name, value in line.items() if name != "source"} for line in found]


def _plain_lines(
    stream: Stream, facts: FileFacts, *, limits: Limits, on_bad: Callable[[int, BadRow, int], None]
) -> Iterator[tuple[int, str]]:
    """Each line's number and text; blank lines are left out."""
    limit = limits.line_bytes
    while raw := stream.readline(limit + 2):
        facts.line += 1
        text = raw.rstrip(b"\r\n")
        if not text.strip():
            continue
        facts.rows += 1
        if len(text) > limit:
            on_bad(facts.line, too_long(len(raw) + rest_of_line(stream, raw), limit), 0)
            continue
        try:
            yield facts.line, text.decode("utf-8")
        except UnicodeDecodeError as error:
            on_bad(facts.line, BadRow("wrong_encoding", f"it is not UTF-8 ({error})", "Convert it with iconv."), 0)


class _Pipe(io.RawIOBase):
    """Bytes as far as they are there; before waiting for more it has `before_wait` done."""

    def __init__(self, source: BufferedIOBase, before_wait: Callable[[], None]) -> None:
        super().__init__()
        self._source = source
        self._before_wait = before_wait
        self._num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._before_wait()
        content = self._source.read1(len(buffer))
        buffer[: len(content)] = content
        self._num_bytes += len(content)
        return len(content)

    def tell(self) -> int:
        return self._num_bytes
