"""Rows of files as they are written: streamed, byte for byte, each with the place it came from. See docs/data.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tunesmith.data.findings import kind_of, refusal
from tunesmith.data.folders import expand
from tunesmith.data.kinds import Kind
from tunesmith.data.opening import FileFacts, look_at, opened
from tunesmith.data.read_documents import conll_sentences, document
from tunesmith.data.read_parquet import parquet_rows
from tunesmith.data.read_tables import csv_rows
from tunesmith.data.read_text import json_array, json_lines
from tunesmith.data.strict_json import BadRow
from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataFile, Limits
from tunesmith.types import Problem, Source

OnProblem = Callable[[Problem], None]


def read(
    files: Sequence[DataFile], *, limits: Limits, on_problem: OnProblem, facts: list[FileFacts] | None = None
) -> Iterator[tuple[int, dict[str, Any], Source]]:
    """Index of the file, the row as a dictionary, and its place; one row at a time, whatever the size of the files.

    A row that cannot be read goes to `on_problem` and reading goes on at the next one. `facts` is filled with what is
    known of each file, before its first row, and kept up to date; of a folder, with each document's.

    Raises:
        DataError: a file cannot be read, holds no row, or is broken so that nobody can say where its next row begins.
            Files that cannot be opened are named together, before the first row.
    """
    for index, of_file in look_at_all(files, on_problem):
        if facts is not None:
            facts.append(of_file)
        yield from _rows(index, of_file, limits=limits, on_problem=on_problem)


def look_at_all(files: Sequence[DataFile], on_problem: OnProblem) -> list[tuple[int, FileFacts]]:
    """What each file is, and each document of a folder, with its index. Raises one `DataError` for all unreadable."""
    found: list[tuple[int, FileFacts]] = []
    refused: list[DataError] = []
    for index, file in enumerate(files):
        try:
            members = expand([file], on_problem)
        except DataError as error:
            refused.append(error)
            continue
        for member in members:
            try:
                facts, warnings = look_at(member.path, member.at)
            except DataError as error:
                refused.append(error)
            else:
                found.append((index, facts))
                for warning in warnings:
                    on_problem(warning)
    if refused:
        raise DataError("\n".join(map(str, refused)), [problem for error in refused for problem in error.problems])
    return found


def _rows(
    index: int, facts: FileFacts, *, limits: Limits, on_problem: OnProblem
) -> Iterator[tuple[int, dict[str, Any], Source]]:
    path = facts.path

    def on_bad(line: int, bad: BadRow, begin: int) -> None:
        place = "" if bad.at is None or facts.kind == "Parquet" else f" (byte {begin + bad.at})"
        on_problem(Problem(Source(path, line), bad.code, f"{bad.message}{place}.", bad.fix))

    for line, record in _records(facts, limits, on_bad):
        if isinstance(record, dict):
            yield index, record, Source(path, line)
        else:
            message = f"the row is {kind_of(record)}, not an object with named fields."
            on_problem(Problem(Source(path, line), "not_an_object", message, 'Write {"prompt": ..., ...}.'))
    facts.done_bytes = facts.total_bytes
    if facts.marks:
        message = f"{facts.marks:,} lines hold no word (-DOCSTART- or a comment) and were left out."
        on_problem(Problem(Source(path, 1), "document_marks", message, severity="warning"))
    if facts.rows == 0:
        raise refusal(path, 1, "empty_dataset", "it holds no row.")


def _records(facts: FileFacts, limits: Limits, on_bad: Callable[[int, BadRow, int], None]) -> Iterator[tuple[int, Any]]:
    if facts.kind == "Parquet":
        yield from parquet_rows(facts, limits=limits, on_bad=on_bad)
        return
    readers: dict[Kind, Callable[..., Iterator[tuple[int, Any]]]] = {
        "JSON lines": json_lines,
        "JSON array": json_array,
        "CSV": csv_rows,
        "CoNLL": conll_sentences,
        "text": document,
    }
    reader = readers[facts.kind]
    with opened(facts) as stream:
        yield from reader(stream, facts, limits=limits, on_bad=on_bad)
