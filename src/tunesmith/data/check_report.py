"""What a check found, as plain values: the command line draws them, `dataclasses.asdict` gives them to machines."""

# I rows, K bins

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.opening import FileFacts
from tunesmith.recipe.schema import DataFile
from tunesmith.types import LabelKind, Problem, Row, Shape, Source

Span = tuple[str, bool]
"""Text and whether it is trained."""
Side = Literal["train", "replay", "eval"]
FIRST_BIN = 32
"""Tokens that the first bin of the length histogram holds; each further one holds twice as many lengths."""


@dataclass(frozen=True, slots=True)
class FileReport:
    """What one file holds, or all the documents of one folder."""

    path: str
    side: Side
    format: str
    """JSON lines, JSON array, CSV, TSV, Parquet, CoNLL, text, with ", gzipped" where it is; "12 documents" of a folder;
    "" if it could not be opened."""
    shape: Shape | None
    """None when no row can be used."""
    rows: int
    """Read, usable or not."""
    usable: int
    skipped: int
    blank: int
    """Blank lines, which are no rows."""
    is_readable: bool
    """False when reading ended before the end of the file, or never began."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Rows that stand in the data more than once."""

    num: int
    """Rows that repeat an earlier one, held-out rows that also stand in training files, or texts with two labels."""
    examples: tuple[tuple[Source, Source], ...]
    """The first few: the row, and the one that it repeats."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Lengths of the usable rows of one side, in tokens."""

    rows: int
    tokens: int
    trained: int
    """Targets: tokens that are trained."""
    shortest: int
    median: int
    p95: int
    longest: int
    edges: tuple[int, ...]
    """K + 1 edges: bin k counts lengths from edges[k] to edges[k + 1] - 1."""
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. `problems` is a listing with an end, the counts are complete."""

    problems: tuple[Problem, ...]
    """In the order of files and lines: the first data.limits.problems errors, and as many warnings."""
    errors: dict[str, int]
    """Problems that make rows unusable, by code."""
    warnings: dict[str, int]
    files: tuple[FileReport, ...]
    duplicates: Pairs
    overlap: Pairs
    held_out: int
    """Rows that are measured: those of the held-out files, or the part that is split off."""
    notes: tuple[str, ...]
    """What else should be said."""
    tokens: dict[Side, TokenStats]
    """Empty without a model, or without a usable row."""
    first_rows: tuple[tuple[Span, ...], ...]
    """The first training rows as the model sees them; of classes and tags, the texts and what they are."""
    refusals: tuple[str, ...]
    """Why training would refuse this data, a line each; empty if it would not."""
    label_kind: LabelKind | None = None
    """What the labels of the training rows are; None: they have none, or they are refused."""
    labels: tuple[tuple[str, int], ...] = ()
    """Classes in the order of their ids, and how many training rows (of tags: words) have each; none of numbers."""
    conflicts: Pairs = Pairs(0, ())
    """Training rows whose text also stands in an earlier one, with another label."""

    @property
    def ok(self) -> bool:
        return not self.refusals


def token_stats(lengths_I: NDArray[np.int32], targets_I: NDArray[np.int32]) -> TokenStats:
    """Statistics of at least one row."""
    longest = int(lengths_I.max())
    edges = [0, FIRST_BIN]
    while edges[-1] <= longest:
        edges.append(2 * edges[-1])
    counts_K, _ = np.histogram(lengths_I, edges)
    median, p95 = np.percentile(lengths_I, [50, 95], method="higher")
    return TokenStats(
        rows=len(lengths_I),
        tokens=int(lengths_I.sum(dtype=np.int64)),
        trained=int(targets_I.sum(dtype=np.int64)),
        shortest=int(lengths_I.min()),
        median=int(median),
        p95=int(p95),
        longest=longest,
        edges=tuple(edges),
        counts=tuple(map(int, counts_K)),
    )


def spans_of(row: Row, decode: Callable[[Sequence[int]], str]) -> tuple[Span, ...]:
    """A row as stretches of text, trained or not, which together are the text of the row."""
    ids = row.ids.tolist()
    cuts = [0, *(np.flatnonzero(row.trained[1:] != row.trained[:-1]) + 1).tolist(), len(ids)]
    spans, before = [], ""
    for start, end in pairwise(cuts):
        # Decoded from the row's start: alone, some tokenizers drop the space at the start of a text.
        text = decode(ids[:end])
        piece = text[len(before) :] if text.startswith(before) else decode(ids[start:end])
        spans.append((piece, bool(row.trained[start])))
        before = text
    return tuple(spans)


def file_report(
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


def _count(members: Sequence[FileReport]) -> str:
    """What a folder holds, in words."""
    if not members:
        return ""
    noun = "document" if all(member.format.startswith("text") for member in members) else "file"
    return f"{len(members):,} {noun}{'' if len(members) == 1 else 's'}"


def folder_report(side: Side, file: DataFile, members: Sequence[FileReport]) -> FileReport:
    """What one entry of the data holds: a file, or the documents of a folder together."""
    if len(members) == 1 and members[0].path == file.path:
        return members[0]
    return FileReport(
        path=file.path,
        side=side,
        format=_count(members),
        shape=next((member.shape for member in members if member.shape), None),
        rows=sum(member.rows for member in members),
        usable=sum(member.usable for member in members),
        skipped=sum(member.skipped for member in members),
        blank=sum(member.blank for member in members),
        is_readable=bool(members) and all(member.is_readable for member in members),
    )
