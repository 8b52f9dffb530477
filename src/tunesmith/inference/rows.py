"""Rows to be answered, from a file or a list, and a line for each in their order, in bounded memory.

`predict --out FILE` is resumable by whole lines, and has its own name only when it is complete:

FILE.part            a line for each row so far
FILE.progress.json   the identity of model, rows and options, until FILE is complete
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson

from tunesmith.data.detect_format import FileFacts
from tunesmith.data.examples import FileExamples, examples
from tunesmith.data.images import as_data_uri
from tunesmith.data.problems import describe_type
from tunesmith.errors import InputError, StorageError
from tunesmith.phrases import changes
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.runs import atomic
from tunesmith.tasks import TASKS
from tunesmith.types import Example, JsonObject, Part, Problem, Record, Shape, Source, TaskName

Line = JsonObject
Answered = Line | Problem
Answers = Callable[[Sequence[Example], Callable[[int], None], Callable[[Problem], None]], Sequence[Answered]]
"""(examples, done, warn) -> the line or problem of each example; `done` gets how many are, `warn` warnings."""

CHUNK_CHARS = 4_000_000
"""Characters at which a chunk of rows ends, if it does not end by its number of rows."""


@dataclass
class Counts:
    """Numbers of rows answered and not, and the warnings."""

    answered: int = 0
    errors: int = 0
    warnings: Counter[str] = field(default_factory=Counter)
    """By code."""
    first: dict[str, Problem] = field(default_factory=dict)
    """The first problem of each code, errors too."""

    def notes(self) -> list[str]:
        """A line for each kind of warning: the first one, and how many there are."""
        counts = sorted(self.warnings.items())
        return [f"{self.first[code]}" + (f" ({num:,} such notes in all)" if num > 1 else "") for code, num in counts]


class RowStream:
    """Collects examples and problems as they are read, and writes lines in the same order, a chunk at a time.

    `skip` is the number of lines that an earlier call wrote: their rows are read again, but not answered.
    """

    def __init__(
        self,
        answers: Answers,
        write: Callable[[Sequence[Line]], None],
        *,
        chunk_rows: int,
        bare: bool = False,
        skip: int = 0,
        tick: Callable[[int, int], None] = lambda rows, within: None,
    ) -> None:
        self.counts = Counts()
        self._answers, self._write, self._tick = answers, write, tick
        self._chunk_rows, self._bare, self._skip = chunk_rows, bare, skip
        self._chunk: list[Example | Problem] = []
        self._num_chars = 0
        self._last: Source | None = None
        """Source of the newest row: all problems of one row come one after the other."""

    def add(self, example: Example) -> None:
        """Add a row that can be answered."""
        num_bytes = sum(len(image.data) for image in example.images)
        self._add(example, sum(len(part.text) for part in example.parts) + num_bytes)

    def report(self, problem: Problem) -> None:
        """Add a row that cannot be answered, or count a warning."""
        if problem.severity == "warning":
            self.warn(problem)
        elif problem.source != self._last:
            self._add(problem, 0)

    def warn(self, problem: Problem) -> None:
        """Count a warning."""
        self.counts.warnings[problem.code] += 1
        self.counts.first.setdefault(problem.code, problem)

    def flush(self) -> None:
        """Answer the collected rows and write their lines."""
        if not self._chunk:
            return
        rows = [item for item in self._chunk if isinstance(item, Example)]
        tick = self._tick
        num_rows = len(self._chunk)
        answers = iter(self._answers(rows, lambda done: tick(done, num_rows), self.warn) if rows else ())
        self._write([self._line(item, next(answers) if isinstance(item, Example) else item) for item in self._chunk])
        self._chunk, self._num_chars = [], 0

    def _add(self, item: Example | Problem, num_chars: int) -> None:
        self._last = item.source
        if self._skip:
            self._skip -= 1
            return
        if len(self._chunk) >= self._chunk_rows or self._num_chars >= CHUNK_CHARS:
            self.flush()
        self._chunk.append(item)
        self._num_chars += num_chars

    def _line(self, item: Example | Problem, answer: Line | Problem) -> Line:
        if isinstance(answer, Problem):
            self.counts.errors += 1
            self.counts.first.setdefault(answer.code, answer)
            columns = item.kept if isinstance(item, Example) else {}
            error = f"{answer.code}: {answer.message} {answer.fix}".strip()
            return {"source": str(answer.source), **columns, "error": error}
        assert isinstance(item, Example)
        self.counts.answered += 1
        line = answer if self._bare else as_row(item, answer)
        if taken := item.kept.keys() & {*line, "source", "error"}:
            raise InputError(
                f"--keep {min(taken)}: each line has a field of this name already. The row's own answer is "
                "kept as reference in any case; rename any other column."
            )
        first = {name: value for name, value in item.kept.items() if name != "reference"}
        last = {"reference": item.kept["reference"]} if "reference" in item.kept else {}
        return {"source": str(item.source), **first, **line, **last}


def as_row(example: Example, answer: Line) -> Line:
    """The input of a row with its answer, as a row that can be trained on."""
    line = {**input_fields(example), **answer}
    if "messages" in line and "answer" in line:
        line["messages"] = [*line["messages"], {"role": "assistant", "content": line.pop("answer")}]
    elif "prompt" in line and "answer" in line:
        line["completion"] = line.pop("answer")
    return line


_NAMES: Mapping[Shape, tuple[str, ...]] = {
    "text": ("text",),
    "text_label": ("text", "text_pair"),
    "text_pairs": ("anchor",),
    "document_summary": ("document",),
}
"""Shape → names of its inputs."""


def input_fields(example: Example) -> JsonObject:
    """The input of a row under the names of its shape, so that it can be read as a row again."""
    texts = [part.text for part in example.parts]
    if example.shape == "tokens_tags":
        return {"tokens": texts}
    if names := _NAMES.get(example.shape):
        return dict(zip(names, texts, strict=False))
    if example.plain and not example.images:
        return dict(zip(("prompt", "completion"), texts, strict=False))
    messages = [{"role": part.role, "content": _content(part), **part.fields} for part in example.parts]
    return {"messages": messages, **({"tools": list(example.tools)} if example.tools else {})}


def _content(part: Part) -> str | list[JsonObject]:
    """The content of a message: with images as OpenAI writes it, each by its path or its bytes."""
    if not part.images:
        return part.text
    pieces, start = list[JsonObject](), 0
    for place, image in part.images:
        if place > start:
            pieces.append({"type": "text", "text": part.text[start:place]})
        pieces.append({"type": "image_url", "image_url": {"url": image.path or as_data_uri(image)}})
        start = place
    return [*pieces, {"type": "text", "text": part.text[start:]}]


def record_of(task: TaskName, text: str, pair: str | None = None) -> Record:
    """A text as a row of the task."""
    return {**TASKS[task].record(text), **({} if pair is None else {"text_pair": pair})}


def read_file(
    path: str, data: Data, task: TaskName, stream: RowStream, facts: list[FileFacts], *, keep: Sequence[str] = ()
) -> None:
    """Add every row of a file to the stream, with the fields `keep`; `data` has names of columns and limits.

    Raises DataError where the file, or the rest of it, cannot be read.
    """
    options = cast(Any, {"task": task, "answered": False, "keep": keep})
    for _, example in examples([DataFile(path=path)], data, stream.report, facts=facts, **options):
        stream.add(example)


def read_list(rows: Iterable[str | Record], data: Data, task: TaskName, stream: RowStream) -> None:
    """Add texts, or rows with named fields, to the stream."""
    facts = FileFacts("rows", "JSON lines")
    of_list = FileExamples(facts, data, stream.report, task, answered=False)
    for number, row in enumerate(rows, start=1):
        source = Source(facts.path, number)
        record = record_of(task, row) if isinstance(row, str) else row
        if not isinstance(record, Mapping):
            message = f"the row is {describe_type(record)}, not an object with named fields."
            stream.report(Problem(source, "not_an_object", message, 'Write {"text": ..., ...}.'))
            continue
        example = of_list.example(dict(record), source)
        if example is not None:
            stream.add(example)
    of_list.finish()


class OutputFile:
    """An open file of answers. `num_lines` were written before, `num_errors` of these without an answer."""

    def __init__(
        self, path: Path, identity: Mapping[str, str], *, kept: Sequence[str] = (), overwrite: bool = False
    ) -> None:
        """Open the file to continue it, without its half last line, or a new one.

        `kept` are columns that lines without an answer have too. Raises InputError where the file is complete,
        was started with another identity, or is being written by another process; StorageError.
        """
        self.path, self.part = path, path.with_name(path.name + ".part")
        self._progress = path.with_name(path.name + ".progress.json")
        self._unanswered = {"source", "error", "reference", *kept}
        self.num_lines, self.num_errors = 0, 0
        atomic.refuse_existing(path, overwrite=overwrite)
        with atomic.storing(path):
            self._file = open(self.part, "a+b", buffering=0)  # noqa: SIM115 (`close` closes it)
        try:
            _lock(self._file.fileno(), path)
            with atomic.storing(path):
                atomic.clean(path.parent, name=self._progress.name)
                if overwrite:
                    self._file.truncate(0)
                if os.fstat(self._file.fileno()).st_size:
                    self._refuse_changes(identity)
                else:
                    atomic.write_atomic(self._progress, atomic.to_json(identity, indent=True) + b"\n")
                self._read_lines()
        except BaseException:
            self._file.close()
            raise

    def _refuse_changes(self, now: Mapping[str, str]) -> None:
        then = atomic.from_json(self._progress.read_bytes()) if self._progress.exists() else {}
        if changed := changes(then, now):
            raise InputError(
                f"{self.path}: was started with something else: {'; '.join(changed)}. Put it back, choose "
                "another --out, or start again with --overwrite."
            )

    def _read_lines(self) -> None:
        """Count the lines, and drop what a killed process left behind the last line end."""
        end = 0
        with open(self.part, "rb") as reader:
            for line in reader:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                value = orjson.loads(line)
                self.num_lines += 1
                self.num_errors += "error" in value and "source" in value and value.keys() <= self._unanswered
        self._file.truncate(end)

    def write(self, lines: Sequence[Record]) -> None:
        """Add lines that are on the disk when this returns. If the disk refuses them, none is there."""
        # Plain JSON, in which a number that is none is null.
        content = memoryview(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
        start = self._file.seek(0, os.SEEK_END)
        try:
            with atomic.storing(self.path, num_bytes=len(content)):
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
        except StorageError:
            self._file.truncate(start)
            raise

    def finish(self) -> None:
        """Give the complete file its name."""
        self._file.close()  # not everywhere can an open file be renamed
        with atomic.storing(self.path):
            os.replace(self.part, self.path)
            self._progress.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove every line."""
        self._file.truncate(0)
        self.close()

    def close(self) -> None:
        """Close the file, to be continued by a later call; without a line it is removed."""
        is_empty = not self._file.closed and not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if is_empty:
            with atomic.storing(self.path):
                self.part.unlink(missing_ok=True)
                self._progress.unlink(missing_ok=True)


def _lock(descriptor: int, path: Path) -> None:
    """Raise InputError where another process writes the file: the lines of both would be mixed."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{path}: another process is writing it. Wait for it, or choose another --out.") from None
    except OSError:  # a file system without locks
        return
