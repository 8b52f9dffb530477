"""Everything that is wrong with the data, at once: files, rows, labels, repeats and, with a model, tokens."""

# I rows

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.check_report import (
    CheckReport,
    FileReport,
    Pairs,
    Side,
    Span,
    TokenStats,
    file_report,
    folder_report,
    spans_of,
    token_stats,
)
from tunesmith.data.check_sides import Judged, SideRows, chunks_of, judge, spans_of_example
from tunesmith.data.class_columns import ask_for_task, refuse_unknown_columns
from tunesmith.data.examples import both_hashes, examples
from tunesmith.data.folders import expand
from tunesmith.data.opening import FileFacts
from tunesmith.data.repeats import conflicts, duplicates, input_overlap, overlap
from tunesmith.data.split import few_note
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile
from tunesmith.types import Example, LabelKind, Problem, Row, Source, TaskName

FIRST_ROWS = 3
PAIRS_LISTED = 20
"""Repeated rows named one by one; all are counted."""

OnProgress = Callable[[int, int], None]
"""Bytes read and bytes in all."""


Tell = Callable[[Source, int, int], str]
"""What to say of a row that repeats another: where that is, the row, the other."""


class Encodes(Protocol):
    """What a check asks of `tunesmith.data.renderer.Renderer`."""

    tokenizer: Any

    def encode(
        self, examples: Sequence[Example], *, on_warning: Callable[[Problem], None] | None = None
    ) -> Sequence[Sequence[Row] | Sequence[Problem]]: ...


def check(
    data: Data,
    *,
    renderer: Encodes | None = None,
    task: TaskName | None = None,
    progress: OnProgress = lambda done, total: None,
) -> CheckReport:
    """What is wrong with the rows of `data`, and what they are; in memory bounded by about 40 bytes a row.

    Without a renderer, nothing is said about tokens; without a task, rows are taken for what their fields are made for.
    Nothing is written.

    Raises:
        RecipeError: data.columns names a field that no shape has; data.labels does not fit the labels.
        ModelError: the tokenizer or its template cannot be used.
    """
    return _Check(data, renderer, task, progress).report()


class _Check:
    """One pass over all files."""

    def __init__(self, data: Data, renderer: Encodes | None, task: TaskName | None, progress: OnProgress) -> None:
        self._data = data
        self._renderer = renderer
        self._task = task
        self._progress = progress
        self._files: list[tuple[Side, DataFile]] = []
        """Files and the documents of folders, as they are come to."""
        self._total_bytes = 0
        self._done_bytes = 0
        self._rows: dict[Side, SideRows] = {"train": SideRows(), "replay": SideRows(), "eval": SideRows()}
        self._first_rows: list[tuple[Span, ...]] = []
        self._counts: dict[str, Counter[str]] = {"error": Counter(), "warning": Counter()}
        self._listed: dict[str, list[Problem]] = {"error": [], "warning": []}
        self._notes: list[str] = []

    def report(self) -> CheckReport:
        refuse_unknown_columns(self._data)
        given: list[tuple[Side, DataFile]] = [
            *(("train", file) for file in self._data.train),
            *(("replay", file) for file in self._data.replay),
            *(("eval", file) for file in self._data.eval),
        ]
        members = [self._members(side, file) for side, file in given]
        self._total_bytes = sum(_size(file.path) for _, file in self._files)
        files = [
            folder_report(side, file, [self._file(index) for index in indices])
            for (side, file), indices in zip(given, members, strict=True)
        ]
        train_I, held_I = (np.frombuffer(self._rows[side].hashes, np.uint64) for side in ("train", "eval"))
        pairs = {
            "duplicate": self._pairs(duplicates(train_I), "train", "duplicate", _repeats),
            "overlap": self._pairs(
                overlap(train_I, held_I),
                "eval",
                "overlap",
                lambda there, row, other: f"this held-out row also stands at {there}, where it is trained.",
                is_error=self._data.overlap == "error",
            ),
        }
        of_train = self._rows["train"].labels
        inputs_I, held_inputs_I = (np.frombuffer(self._rows[side].inputs, np.uint64) for side in ("train", "eval"))
        self._notes += input_overlap(np.isin(held_I, train_I), inputs_I, held_inputs_I)
        if len(of_train.of_rows) == len(train_I):
            found_I = conflicts(inputs_I, train_I)
            pairs["conflicts"] = self._pairs(found_I, "train", "conflicting_labels", of_train.difference)
        labels = self._labels()
        held_out = self._held_out(labels.kind)
        return CheckReport(
            problems=self._in_order(),
            errors=dict(self._counts["error"]),
            warnings=dict(self._counts["warning"]),
            files=tuple(files),
            duplicates=pairs["duplicate"],
            overlap=pairs["overlap"],
            held_out=held_out,
            notes=tuple(self._notes),
            tokens=self._token_stats(),
            first_rows=tuple(self._first_rows),
            refusals=(*self._refusals(files), *labels.refusals),
            label_kind=labels.kind,
            labels=labels.counts,
            conflicts=pairs.get("conflicts", Pairs(0, ())),
        )

    def _members(self, side: Side, file: DataFile) -> range:
        """Indices of the files that one entry stands for; none if it is a folder that cannot be used."""
        try:
            members = expand([file], self._hear)
        except DataError as error:
            for problem in error.problems:
                self._hear(problem)
            return range(0)
        self._files += ((side, member) for member in members)
        return range(len(self._files) - len(members), len(self._files))

    def _file(self, index: int) -> FileReport:
        side, file = self._files[index]
        facts: list[FileFacts] = []
        usable, shape, is_readable = 0, None, True
        source = examples([file], self._data, self._hear, facts=facts, task=self._task)
        try:
            for chunk in chunks_of(example for _, example in source):
                shape = chunk[-1].shape
                usable += self._chunk(chunk, index)
                done = min(self._done_bytes + facts[0].done_bytes, self._total_bytes)
                self._progress(done, self._total_bytes)
        except DataError as error:
            is_readable = False
            for problem in error.problems:
                self._hear(problem)
        self._done_bytes += _size(file.path)
        self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
        return file_report(side, file, facts, usable=usable, shape=shape, is_readable=is_readable)

    def _chunk(self, chunk: Sequence[Example], index: int) -> int:
        """Remember what is usable of some examples. Returns how many are."""
        side = self._files[index][0]
        rows = self._rows[side]
        encoded: Sequence[Sequence[Row] | Sequence[Problem]] = [()] * len(chunk)
        if self._renderer is not None:
            encoded = self._renderer.encode(chunk, on_warning=self._hear)
        usable = 0
        for example, result in zip(chunk, encoded, strict=True):
            bad = [problem for problem in result if isinstance(problem, Problem)]
            for problem in bad:
                self._hear(problem)
            if bad:
                continue
            usable += 1
            rows.labels.add(example)
            if example.labels and side == "train" and len(self._first_rows) < FIRST_ROWS:
                self._first_rows.append(spans_of_example(example))
            content, read = both_hashes(example)
            rows.hashes.append(content)
            rows.inputs.append(read)
            rows.files.append(index)
            rows.lines.append(example.source.line)
            for row in result:
                assert isinstance(row, Row)
                rows.lengths.append(len(row.ids))
                trained = row.trained if row.labels is not None else row.trained[1:]
                rows.targets.append(int(trained.sum()))
                if not example.labels and side == "train" and len(self._first_rows) < FIRST_ROWS:
                    self._first_rows.append(self._spans(row))
        return usable

    def _spans(self, row: Row) -> tuple[Span, ...]:
        assert self._renderer is not None
        return spans_of(row, self._renderer.tokenizer.decode)

    def _hear(self, problem: Problem) -> None:
        self._counts[problem.severity][problem.code] += 1
        listed = self._listed[problem.severity]
        if len(listed) < self._data.limits.problems:
            listed.append(problem)

    def _pairs(self, found_I: NDArray[np.int64], side: Side, code: str, tell: Tell, *, is_error: bool = False) -> Pairs:
        """Say of the first rows, given as (row, row that it repeats), that they repeat another; count all."""
        examples = []
        for row, other in found_I[:PAIRS_LISTED].tolist():
            here, there = self._source(side, row), self._source("train", other)
            examples.append((here, there))
            self._hear(Problem(here, code, tell(there, row, other), "", "error" if is_error else "warning"))
        more = len(found_I) - len(examples)
        if more:
            self._counts["error" if is_error else "warning"][code] += more
        return Pairs(len(found_I), tuple(examples))

    def _source(self, side: Side, row: int) -> Source:
        rows = self._rows[side]
        return Source(self._files[rows.files[row]][1].path, rows.lines[row])

    def _labels(self) -> Judged:
        sides: tuple[Side, ...] = ("train", "eval") if self._data.eval else ("train",)
        judged = judge([self._rows[side].labels for side in sides], self._data)
        for problem in judged.problems:
            self._hear(problem)
        self._notes += judged.notes
        return judged

    def _held_out(self, kind: LabelKind | None) -> int:
        num, notes = len(self._rows["eval"].hashes), list[str]()
        if not self._data.eval:
            num, notes = self._rows["train"].held_out(self._data.held_out, kind)
        self._notes += [*notes, few] if (few := few_note(num)) else notes
        return num

    def _token_stats(self) -> dict[Side, TokenStats]:
        return {
            side: token_stats(np.frombuffer(rows.lengths, np.int32), np.frombuffer(rows.targets, np.int32))
            for side, rows in self._rows.items()
            if len(rows.lengths)
        }

    def _in_order(self) -> tuple[Problem, ...]:
        order = {file.path: index for index, (_, file) in reversed(list(enumerate(self._files)))}
        listed = [*self._listed["error"], *self._listed["warning"]]
        return tuple(sorted(listed, key=lambda p: (order.get(p.source.path, 0), p.source.line)))

    def _refusals(self, files: Sequence[FileReport]) -> Iterator[str]:
        for file in files:
            if not file.is_readable:
                yield f"{file.path} cannot be used as it is"
        asked_for = {"overlap", "unknown_label"} | ({"too_long"} if self._data.too_long == "drop" else set())
        num_bad = sum(n for code, n in self._counts["error"].items() if code not in asked_for)
        if num_bad and self._data.bad_rows == "error" and all(file.is_readable for file in files):
            what = "1 problem makes its row unusable" if num_bad == 1 else f"{num_bad:,} problems make rows unusable"
            yield f"{what}; --set data.bad_rows=skip leaves such rows out"
        if self._counts["error"]["overlap"]:
            yield "held-out rows stand in the training files, and data.overlap is error"
        for side in ("train", "eval"):
            if not any(file.usable for file in files if file.side == side) and (side == "train" or self._data.eval):
                yield f"data.{side}: no row can be used"
        if self._task is None and (question := ask_for_task(self._data)):
            yield question


def _repeats(there: Source, row: int, other: int) -> str:
    return f"the row repeats {there}."


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0
