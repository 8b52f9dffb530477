"""Everything that is wrong with the data, at once: a dry run of encoding, with statistics."""

# I rows

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.addresses import size_of
from tunesmith.data.branches import lines_of
from tunesmith.data.columns import absent_columns, ask_text_or_classes, usual_columns
from tunesmith.data.dataset import LabelColumn
from tunesmith.data.detect_format import FileFacts
from tunesmith.data.encode import SCHEMA, WORTH_BYTES, Encoded, encode_chunks, num_processes, relabelled
from tunesmith.data.examples import examples
from tunesmith.data.formats import SHAPES, task_of_rows
from tunesmith.data.hold_out import choose_share, few_note, firsts, hold_out, input_overlap, rare_note
from tunesmith.data.labels import LabelCounts, missing_names_note, resolve_labels, similar_names_notes
from tunesmith.data.problems import SKIP, num_refused, unusable
from tunesmith.data.read import expand_folders
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, LabelKind, Part, Problem, Row, Shape, Source, TaskName

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer

Side = Literal["train", "replay", "eval"]
ALL_SIDES: tuple[Side, ...] = ("train", "replay", "eval")
Span = tuple[str, bool]
"""Text and whether it is trained."""
FIRST_ROWS = 3
PAIRS_LISTED = 20
"""Repeated rows listed one by one; all are counted."""
LABELLED: tuple[Shape, ...] = ("text_label", "tokens_tags")
KEPT = ["file", "line", "hash", "input", "length", "targets", "labels"]
"""Columns of rows that are kept: about 50 bytes a row."""

OnProgress = Callable[[int, int], None]
"""Bytes read and bytes in total."""
_REPEATS = {
    "duplicate": "the row repeats {}.",
    "overlap": "this held-out row is also at {}, where it is trained.",
    "conflicting_labels": "the text is also at {}, with another label: one of them is likely wrong.",
}
"""Messages about a row that repeats another in some way, by code."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """Contents of one file, or of all files of one folder."""

    path: str
    side: Side
    format: str
    """JSON lines, JSON array, CSV, TSV, Parquet, CoNLL, text, with ", gzipped" if it is; "12 documents" for a
    folder; "" if it could not be opened."""
    shape: Shape | None
    """None if no row can be used."""
    rows: int
    """Rows read, usable or not."""
    usable: int
    is_readable: bool
    """False if reading ended before the end of the file, or never began."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Lengths of the usable rows of one side, in tokens."""

    rows: int
    tokens: int
    trained: int
    """Targets: trained tokens."""
    shortest: int
    median: int
    p95: int
    longest: int


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Result of a check. `problems` lists the first ones; the counts are complete."""

    problems: tuple[Problem, ...]
    """In the order of files and lines: the first data.limits.problems errors, and as many warnings."""
    errors: dict[str, int]
    """Problems that make rows unusable, by code."""
    warnings: dict[str, int]
    files: tuple[FileReport, ...]
    held_out: int
    """Rows that are measured: the held-out files, or the part that is split off."""
    notes: tuple[str, ...]
    tokens: dict[Side, TokenStats]
    """Empty without a model, or without a usable row."""
    first_rows: tuple[tuple[Span, ...], ...]
    """The first rows as the model sees them; without a model or for labels the texts and their labels."""
    forms: tuple[tuple[str, tuple[Span, ...]], ...]
    """A training row of each shape, as `first_rows`, after its place and shape."""
    refusals: tuple[str, ...]
    """Why training would refuse this data, one line each; empty if it would not."""
    label_kind: LabelKind | None = None
    """Kind of the labels of the training rows; None: they have none, or they are refused."""
    labels: tuple[tuple[str, int], ...] = ()
    """Classes in the order of their ids, with their training rows (for tags: words); none for numbers."""

    @property
    def ok(self) -> bool:
        return not self.refusals


def check(
    data: Data,
    *,
    renderer: Renderer | None = None,
    task: TaskName | None = None,
    progress: OnProgress = lambda done, total: None,
) -> CheckReport:
    """Read and encode all rows as training would, keep about 50 bytes of each, and report every problem.

    Without a renderer nothing is said about tokens; without a task the fields of rows decide what they are for.
    Nothing is written.

    Raises:
        RecipeError: data.columns names a field that no shape has; data.labels does not fit the labels.
        ModelError: the tokenizer or its template cannot be used.
    """
    return _Check(data, renderer, task, progress).report()


class _Unread:
    """Stands for a renderer where there is no model: each example is a row without tokens."""

    def encode(self, examples: Sequence[Example], *, on_warning: Any, vocabulary: dict[str, int]) -> list[list[Row]]:
        nothing, rows = np.empty(0, np.int32), []
        for example in examples:
            ids = [vocabulary.setdefault(name, len(vocabulary)) for name in example.labels]
            labels = np.array(ids, np.int64) if example.shape in LABELLED else None
            rows.append([Row(nothing, nothing.astype(np.bool_), example.source, labels=labels)])
        return rows


class _Side:
    """The usable rows of one side, without their tokens."""

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        """Labels by first appearance."""
        self.many = False
        self.shape: Shape | None = None
        self._batches: list[pa.RecordBatch] = []

    def add(self, encoded: Encoded) -> None:
        self._batches.append(relabelled(encoded.rows, encoded.names, self.vocabulary).select(KEPT))
        self.many |= bool(encoded.many)

    def done(self) -> None:
        """Look at all rows together: the first of each example, if it has several."""
        self.rows = pa.Table.from_batches(self._batches, pa.schema([SCHEMA.field(name) for name in KEPT]))
        file_I, line_I = (self.rows[name].to_numpy() for name in ("file", "line"))
        is_first = np.diff(file_I, prepend=-1).astype(np.bool_) | np.diff(line_I, prepend=-1).astype(np.bool_)
        examples = self.rows.filter(is_first)
        self.hashes, self.inputs, self.files, self.lines = (
            examples[name].to_numpy() for name in ("hash", "input", "file", "line")
        )
        self.labels = LabelColumn(examples, tuple(self.vocabulary))


class _Check:
    """One read of all files."""

    def __init__(self, data: Data, renderer: Renderer | None, task: TaskName | None, progress: OnProgress) -> None:
        self._data = data
        self._renderer = renderer
        self._task = self._given_task = task
        self._progress = progress
        self._paths: list[str] = []
        """Files and the documents of folders, in the order in which they are read."""
        self._total_bytes = self._done_bytes = 0
        self._sides: dict[Side, _Side] = {side: _Side() for side in ALL_SIDES}
        self._first_rows: list[tuple[Span, ...]] = []
        self._forms: dict[Shape, tuple[str, tuple[Span, ...]]] = {}
        self._counts: dict[str, Counter[str]] = {"error": Counter(), "warning": Counter()}
        self._listed: dict[str, list[Problem]] = {"error": [], "warning": []}
        self._notes: list[str] = []
        self._label_kind: LabelKind | None = None
        self._absent: list[Problem] = []

    def report(self) -> CheckReport:
        self._absent = absent_columns(self._data)
        for problem in self._absent:
            self._hear(problem)
        if usual := usual_columns(self._data, self._task):
            columns, note = usual
            self._data = self._data.model_copy(update={"columns": columns})
            self._notes.append(note)
        sides = [(side, file) for side in ALL_SIDES for file in getattr(self._data, side)]
        entries = [(side, file, self._members(file, side)) for side, file in sides]
        self._total_bytes = sum(size_of(member.at) for *_, members in entries for member in members)
        files = [self._entry(side, file, members) for side, file, members in entries]
        for side_check in self._sides.values():
            side_check.done()
        train, held = self._sides["train"], self._sides["eval"]
        train_I, held_I = train.hashes, held.hashes
        first_I, trained_at_I = firsts(train_I, train_I), firsts(train_I, held_I)
        self._repeats(first_I, first_I != np.arange(len(first_I)), "train", "duplicate")
        self._repeats(trained_at_I, trained_at_I >= 0, "eval", "overlap")
        self._notes += input_overlap(np.isin(held_I, train_I), train.inputs, held.inputs)
        if train.shape == "text_label":
            first_I = firsts(train.inputs, train.inputs)
            self._repeats(first_I, train_I != train_I[first_I], "train", "conflicting_labels")
        labels, label_refusals = self._labels()
        held_out = self._held_out()
        return CheckReport(
            problems=self._in_order(),
            errors=dict(self._counts["error"]),
            warnings=dict(self._counts["warning"]),
            files=tuple(files),
            held_out=held_out,
            notes=tuple(self._notes),
            tokens={
                side: token_stats(rows_of_side.rows["length"].to_numpy(), rows_of_side.rows["targets"].to_numpy())
                for side, rows_of_side in self._sides.items()
                if self._renderer is not None and len(rows_of_side.hashes)
            },
            first_rows=tuple(self._first_rows),
            forms=tuple(self._forms.values()),
            refusals=(*self._refusals(files), *(label_refusals if all(file.is_readable for file in files) else ())),
            label_kind=self._label_kind,
            labels=labels,
        )

    def _members(self, file: DataFile, side: Side) -> Sequence[DataFile]:
        """The files of one entry of the data; none if it is a folder that cannot be used."""
        try:
            return expand_folders([file], self._hear, trained=side != "eval", how=self._data.reading)
        except DataError as error:
            self._hear_all(error)
            return ()

    def _entry(self, side: Side, file: DataFile, members: Sequence[DataFile]) -> FileReport:
        reports = [self._file(side, member) for member in members]
        if len(reports) == 1 and reports[0].path == file.path:
            return reports[0]
        noun = "document" if all(member.format.startswith("text") for member in reports) else "file"
        return FileReport(
            path=file.path,
            side=side,
            format=f"{len(reports):,} {noun}{'' if len(reports) == 1 else 's'}" if reports else "",
            shape=next((member.shape for member in reports if member.shape), None),
            rows=sum(member.rows for member in reports),
            usable=sum(member.usable for member in reports),
            is_readable=bool(reports) and all(member.is_readable for member in reports),
        )

    def _file(self, side: Side, file: DataFile) -> FileReport:
        self._paths.append(file.path)
        facts: list[FileFacts] = []
        usable, shape, is_readable = 0, None, True
        read = examples([file], self._data, self._hear, facts=facts, task=self._task)
        numbered = ((len(self._paths) - 1, example) for _, example in read)
        renderer = self._renderer or cast("Renderer", _Unread())
        is_large = size_of(file.at) >= WORTH_BYTES  # each file has processes of its own
        num_proc = num_processes(self._data, WORTH_BYTES) if self._renderer and is_large else 1
        try:
            for chunk, encoded, done in encode_chunks(numbered, renderer, facts, num_proc):
                shape = chunk[-1][1].shape
                usable += self._chunk(side, [example for _, example in chunk], encoded)
                self._progress(min(self._done_bytes + done, self._total_bytes), self._total_bytes)
        except DataError as error:
            is_readable = False
            self._hear_all(error)
        self._done_bytes += size_of(file.at)
        self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
        num, form = (facts[0].rows, str(facts[0])) if facts else (0, "")
        return FileReport(file.path, side, form, shape, num, usable, is_readable)

    def _chunk(self, side: Side, chunk: Sequence[Example], encoded: Encoded) -> int:
        """Remember the examples that can be used. Returns how many can."""
        rows = self._sides[side]
        for problem in encoded.problems:
            self._hear(problem)
        lines = set(encoded.rows.column("line").to_pylist())
        usable = [example for example in chunk if example.source.line in lines]
        rows.add(encoded)
        for example in usable:
            rows.shape = example.shape
            if side == "train" and (len(self._first_rows) < FIRST_ROWS or example.shape not in self._forms):
                self._show(example)
        if usable and self._task is None:  # as training, which decides by the first row
            self._task = task_of_rows(usable[0].shape)
        return len(usable)

    def _show(self, example: Example) -> None:
        if example.labels or self._renderer is None:
            lines = [spans_of_texts(example)]
        else:
            made = [row for row in self._renderer.encode([example])[0] if isinstance(row, Row)]
            lines = [spans_of(line, self._renderer.tokenizer.decode) for row in made for line in lines_of(row)]
        self._first_rows += lines[: FIRST_ROWS - len(self._first_rows)]
        if lines:
            self._forms.setdefault(example.shape, (f"{example.source}: {example.shape}", lines[0]))

    def _hear(self, problem: Problem) -> None:
        if problem.code == "columns_unused" and problem.severity == "warning" and self._absent:
            return  # said of all files
        self._counts[problem.severity][problem.code] += 1
        listed = self._listed[problem.severity]
        if len(listed) < self._data.limits.problems:
            listed.append(problem)

    def _hear_all(self, error: DataError) -> None:
        for problem in error.problems:
            self._hear(problem)

    def _repeats(self, first_I: NDArray[np.int64], repeats_I: NDArray[np.bool_], side: Side, code: str) -> None:
        """Report the first rows that repeat a training row, whose numbers are in `first_I`, and count all."""
        is_error = code == "overlap" and self._data.overlap == "error"
        severity: Literal["error", "warning"] = "error" if is_error else "warning"
        rows_I = np.flatnonzero(repeats_I)
        for row in rows_I[:PAIRS_LISTED].tolist():
            message = _REPEATS[code].format(self._source("train", int(first_I[row])))
            self._hear(Problem(self._source(side, row), code, message, "", severity))
        if (more := len(rows_I) - PAIRS_LISTED) > 0:
            self._counts[severity][code] += more

    def _source(self, side: Side, row: int) -> Source:
        rows = self._sides[side]
        return Source(self._paths[int(rows.files[row])], int(rows.lines[row]))

    def _labels(self) -> tuple[tuple[tuple[str, int], ...], list[str]]:
        """Classes and their counts if training accepts the labels, else why it refuses them."""
        shape = self._sides["train"].shape
        if shape not in LABELLED:
            return (), []
        sides: tuple[Side, ...] = ("train", "eval") if self._data.eval else ("train",)
        seen = [self._label_counts(side) for side in sides]
        task = next(task for task, shapes in SHAPES.items() if shape in shapes)
        try:
            labels, _ = resolve_labels(task=task, data=self._data, class_weights="equal", trained=seen[0], sides=seen)
        except DataError as error:
            self._hear_all(error)
            return (), ["labels that cannot be learnt" if error.problems else str(error)]
        self._label_kind, counts = labels.kind, seen[0].counts
        if labels.kind == "number":
            numbers = sorted(map(float, counts))
            self._notes.append(f"labels are numbers from {numbers[0]:g} to {numbers[-1]:g}")
            return (), []
        self._notes += [*similar_names_notes(labels.names), *missing_names_note(counts)]
        return tuple((name, counts.get(name, 0)) for name in labels.names), []

    def _label_counts(self, side: Side) -> LabelCounts:
        rows = self._sides[side]
        every_I = np.ones(len(rows.hashes), np.int64)
        return rows.labels.label_counts(every_I, many=rows.many, source=partial(self._source, side))

    def _held_out(self) -> int:
        """Number of rows that training would hold out."""
        num, notes, rows = len(self._sides["eval"].hashes), list[str](), self._sides["train"]
        if not self._data.eval:
            share = self._data.held_out
            part = float(choose_share(len(rows.inputs)).value) if share == "auto" else share
            classes_I = rows.labels.firsts() if self._label_kind == "one" else None
            mask_I, notes = hold_out(rows.inputs, rows.hashes, classes_I, part)
            if classes_I is not None:
                notes = [*notes, *rare_note(rows.labels.vocabulary, classes_I, mask_I)]
            num = int(mask_I.sum())
        self._notes += [*notes, few] if (few := few_note(num)) else notes
        return num

    def _in_order(self) -> tuple[Problem, ...]:
        order = {path: index for index, path in reversed(list(enumerate(self._paths)))}
        listed = [*self._listed["error"], *self._listed["warning"]]
        return tuple(sorted(listed, key=lambda p: (order.get(p.source.path, 0), p.source.line)))

    def _refusals(self, files: Sequence[FileReport]) -> list[str]:
        refusals = [f"{file.path} cannot be used as it is" for file in files if not file.is_readable]
        others = ("overlap", "unknown_label", "columns_unused")
        of_rows = {code: num for code, num in self._counts["error"].items() if code not in others}
        sides = ("train", "eval") if self._data.eval else ("train",)
        empty = [side for side in sides if not any(file.usable for file in files if file.side == side)]
        if not refusals and (num_bad := num_refused(self._data, of_rows)):
            refusals.append(unusable(num_bad) + ("" if empty else f"; {SKIP} leaves such rows out"))
        if self._absent:
            refusals.append("data.columns names what no row has")
        if self._counts["error"]["overlap"]:
            refusals.append("held-out rows are also in the training files, and data.overlap is error")
        refusals += [f"data.{side}: no row can be used" for side in empty]
        if self._given_task is None and (question := ask_text_or_classes(self._data)):
            refusals.append(str(question))
        return refusals


def token_stats(lengths_I: NDArray[np.int32], targets_I: NDArray[np.int32]) -> TokenStats:
    """Statistics of at least one row."""
    median, p95 = np.percentile(lengths_I, [50, 95], method="higher")
    return TokenStats(
        rows=len(lengths_I),
        tokens=int(lengths_I.sum(dtype=np.int64)),
        trained=int(targets_I.sum(dtype=np.int64)),
        shortest=int(lengths_I.min()),
        median=int(median),
        p95=int(p95),
        longest=int(lengths_I.max()),
    )


def spans_of(row: Row, decode: Callable[[Sequence[int]], str]) -> tuple[Span, ...]:
    """A row as stretches of text, trained or not, which together are the text of the row."""
    ids = row.ids.tolist()
    cuts = [0, *(np.flatnonzero(row.trained[1:] != row.trained[:-1]) + 1).tolist(), len(ids)]
    spans, before = [], ""
    for start, end in pairwise(cuts):
        # Decoded from the row's start: some tokenizers drop the space at the start of a text.
        text = decode(ids[:end])
        piece = text[len(before) :] if text.startswith(before) else decode(ids[start:end])
        spans.append((piece, bool(row.trained[start])))
        before = text
    return tuple(spans)


def spans_of_texts(example: Example) -> tuple[Span, ...]:
    """The texts of an example and its labels, before any template. Labels count as trained."""
    if example.shape == "tokens_tags":
        pairs = zip(example.parts, example.labels, strict=True)
        return tuple(span for part, tag in pairs for span in ((f"{part.text} ", False), (f"{tag} ", True)))
    if not example.branches:
        is_one = len(example.parts) == 1
        spans = [span for part in example.parts for span in _said(part, named=not (is_one or example.labels))]
        has_labels = example.labels or example.many
        return (*spans, (", ".join(example.labels) or "none", True)) if has_labels else tuple(spans)
    spans = [span for part in example.parts for span in _said(part, named=True)]
    for i, branch in enumerate(example.branches):
        spans += [span for part in branch for span in _said(part, named=True)]
        spans += [(example.labels[i], True), ("\n", False)] if i < len(example.labels) else []
    return tuple(spans)


def _said(part: Part, *, named: bool) -> list[Span]:
    name = f"{part.role}: " if named else ""
    if part.trained:
        return [(name, False), (part.text, True), ("\n", False)]
    return [(f"{name}{part.text}\n", False)]
