"""Everything that is wrong with the data, at once: files, rows, duplicates, overlap and, with a model, tokens."""

# I rows

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.check_report import CheckReport, FileReport, Pairs, Side, Span, TokenStats, spans_of, token_stats
from tunesmith.data.examples import content_hash, examples
from tunesmith.data.opening import FileFacts
from tunesmith.data.split import held_out_mask, split_note
from tunesmith.errors import DataError
from tunesmith.recipe.knobs import Data, DataFile
from tunesmith.types import Example, Problem, Row, Shape, Source

CHUNK_EXAMPLES = 512
CHUNK_CHARS = 4_000_000
"""Examples rendered at once: whichever bound is met first."""
FIRST_ROWS = 3
PAIRS_LISTED = 20
"""Repeated rows named one by one; all are counted."""

OnProgress = Callable[[int, int], None]
"""Bytes read and bytes in all."""


class Encodes(Protocol):
    """What a check asks of `tunesmith.data.render.Renderer`."""

    tokenizer: Any

    def encode(
        self, examples: Sequence[Example], *, on_warning: Callable[[Problem], None] | None = None
    ) -> Sequence[Sequence[Row] | Sequence[Problem]]: ...


def check(
    data: Data, *, renderer: Encodes | None = None, progress: OnProgress = lambda done, total: None
) -> CheckReport:
    """What is wrong with the rows of `data`, and what they are; in memory bounded by about 30 bytes a row.

    Without a renderer, nothing is said about tokens. Nothing is written.

    Raises:
        RecipeError: data.columns names a field that no shape has.
        ModelError: the tokenizer or its template cannot be used.
    """
    return _Check(data, renderer, progress).report()


@dataclass
class _Rows:
    """What is remembered of the usable rows of one side."""

    hashes: array[int] = field(default_factory=lambda: array("Q"))
    files: array[int] = field(default_factory=lambda: array("i"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("i"))
    targets: array[int] = field(default_factory=lambda: array("i"))


class _Check:
    """One pass over all files."""

    def __init__(self, data: Data, renderer: Encodes | None, progress: OnProgress) -> None:
        self._data = data
        self._renderer = renderer
        self._progress = progress
        self._files: list[tuple[Side, DataFile]] = [
            *(("train", file) for file in data.train),
            *(("eval", file) for file in data.eval),
        ]
        self._total_bytes = sum(_size(file.path) for _, file in self._files)
        self._done_bytes = 0
        self._rows: dict[Side, _Rows] = {"train": _Rows(), "eval": _Rows()}
        self._first_rows: list[tuple[Span, ...]] = []
        self._counts: dict[str, Counter[str]] = {"error": Counter(), "warning": Counter()}
        self._listed: dict[str, list[Problem]] = {"error": [], "warning": []}

    def report(self) -> CheckReport:
        files = [self._file(index) for index in range(len(self._files))]
        train, held = self._rows["train"], self._rows["eval"]
        duplicates = _duplicates(np.frombuffer(train.hashes, np.uint64))
        overlap = _overlap(np.frombuffer(train.hashes, np.uint64), np.frombuffer(held.hashes, np.uint64))
        pairs = {
            "duplicate": self._pairs(duplicates, "train", "duplicate", "the row repeats {}.", is_error=False),
            "overlap": self._pairs(
                overlap,
                "eval",
                "overlap",
                "this held-out row also stands at {}, where it is trained.",
                is_error=self._data.overlap == "error",
            ),
        }
        held_out, notes = self._held_out()
        return CheckReport(
            problems=self._in_order(),
            errors=dict(self._counts["error"]),
            warnings=dict(self._counts["warning"]),
            files=tuple(files),
            duplicates=pairs["duplicate"],
            overlap=pairs["overlap"],
            held_out=held_out,
            notes=tuple(notes),
            tokens=self._token_stats(),
            first_rows=tuple(self._first_rows),
            refusals=tuple(self._refusals(files)),
        )

    def _file(self, index: int) -> FileReport:
        side, file = self._files[index]
        facts: list[FileFacts] = []
        usable, shape, is_readable = 0, None, True
        source = examples([file], self._data, self._hear, facts=facts)
        try:
            for chunk in _chunks(example for _, example in source):
                shape = chunk[-1].shape
                usable += self._chunk(chunk, index)
                self._progress(min(self._done_bytes + facts[0].done_bytes, self._total_bytes), self._total_bytes)
        except DataError as error:
            is_readable = False
            for problem in error.problems:
                self._hear(problem)
        self._done_bytes += _size(file.path)
        self._progress(min(self._done_bytes, self._total_bytes), self._total_bytes)
        return _file_report(side, file, facts, usable=usable, shape=shape, is_readable=is_readable)

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
            rows.hashes.append(content_hash(example))
            rows.files.append(index)
            rows.lines.append(example.source.line)
            for row in result:
                assert isinstance(row, Row)
                rows.lengths.append(len(row.ids))
                trained = row.trained if row.labels is not None else row.trained[1:]
                rows.targets.append(int(trained.sum()))
                if side == "train" and len(self._first_rows) < FIRST_ROWS:
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

    def _pairs(self, found_I: NDArray[np.int64], side: Side, code: str, message: str, *, is_error: bool) -> Pairs:
        """Say of the first rows, given as (row, row that it repeats), that they repeat another; count all."""
        examples = []
        for row, other in found_I[:PAIRS_LISTED].tolist():
            here, there = self._source(side, row), self._source("train", other)
            examples.append((here, there))
            self._hear(Problem(here, code, message.format(there), "", "error" if is_error else "warning"))
        more = len(found_I) - len(examples)
        if more:
            self._counts["error" if is_error else "warning"][code] += more
        return Pairs(len(found_I), tuple(examples))

    def _source(self, side: Side, row: int) -> Source:
        rows = self._rows[side]
        return Source(self._files[rows.files[row]][1].path, rows.lines[row])

    def _held_out(self) -> tuple[int, list[str]]:
        if self._data.eval:
            return len(self._rows["eval"].hashes), []
        hashes_I = np.frombuffer(self._rows["train"].hashes, np.uint64)
        note = split_note(hashes_I, self._data.held_out) if len(hashes_I) else None
        return int(held_out_mask(hashes_I, self._data.held_out).sum()), [note] if note else []

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
                yield f"{file.path} cannot be read to its end"
        asked_for = {"overlap"} | ({"too_long"} if self._data.too_long == "drop" else set())
        num_bad = sum(n for code, n in self._counts["error"].items() if code not in asked_for)
        if num_bad and self._data.bad_rows == "error" and all(file.is_readable for file in files):
            yield f"{num_bad:,} problems make rows unusable; data.bad_rows: skip leaves those rows out"
        if self._counts["error"]["overlap"]:
            yield "held-out rows stand in the training files, and data.overlap is error"
        for side in ("train", "eval"):
            if not any(file.usable for file in files if file.side == side) and (side == "train" or self._data.eval):
                yield f"data.{side}: no row can be used"


def _chunks(source: Iterator[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    num_chars = 0
    try:
        for example in source:
            chunk.append(example)
            num_chars += sum(len(part.text) for part in example.parts)
            if len(chunk) >= CHUNK_EXAMPLES or num_chars >= CHUNK_CHARS:
                yield chunk
                chunk, num_chars = [], 0
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _file_report(
    side: Side, file: DataFile, facts: Sequence[FileFacts], *, usable: int, shape: Shape | None, is_readable: bool
) -> FileReport:
    known = facts[0] if facts else None
    rows = known.rows if known else 0
    return FileReport(
        path=file.path,
        side=side,
        format=str(known) if known else "",
        shape=shape,
        rows=rows,
        usable=usable,
        skipped=rows - usable,
        blank=known.blank if known else 0,
        is_readable=is_readable,
    )


def _duplicates(hashes_I: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(row, the first row that is the same) of every row that repeats one, in the order of rows."""
    order_I = np.argsort(hashes_I, kind="stable")
    sorted_I = hashes_I[order_I]
    starts_I = np.ones(len(sorted_I), np.bool_)
    starts_I[1:] = sorted_I[1:] != sorted_I[:-1]
    firsts_I = order_I[np.flatnonzero(starts_I)][np.cumsum(starts_I) - 1] if len(order_I) else order_I
    again_I = np.sort(order_I[~starts_I])
    first_of_I = np.empty_like(order_I)
    first_of_I[order_I] = firsts_I
    return np.stack([again_I, first_of_I[again_I]], axis=1)


def _overlap(train_I: NDArray[np.uint64], held_I: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(held-out row, the first training row that is the same), in the order of held-out rows."""
    shared_I = np.flatnonzero(np.isin(held_I, train_I))
    if not len(shared_I):
        return np.empty((0, 2), np.int64)
    values, firsts = np.unique(train_I, return_index=True)
    return np.stack([shared_I, firsts[np.searchsorted(values, held_I[shared_I])]], axis=1)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0
