"""Files for tests, and what is read from them."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tunesmith.data.examples import examples
from tunesmith.data.read import read
from tunesmith.data.renderer import Encoded
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Data, DataFile, Limits
from tunesmith.types import Example, Problem, Row, TaskName

Record = Mapping[str, Any]


def json_lines(rows: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def escaped_json_lines(rows: Sequence[Record]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=True).encode() + b"\r\n" for row in rows)


def json_array(rows: Sequence[Record]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def comma_separated(rows: Sequence[Record], delimiter: str = ",") -> bytes:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(rows[0])
    writer.writerows([row[name] for name in rows[0]] for row in rows)
    return sink.getvalue().encode()


def tab_separated(rows: Sequence[Record]) -> bytes:
    return comma_separated(rows, "\t")


def parquet(rows: Sequence[Record]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), sink)
    return sink.getvalue()


WRITERS: dict[str, Callable[[Sequence[Record]], bytes]] = {
    "rows.jsonl": json_lines,
    "escaped.jsonl": escaped_json_lines,
    "rows.json": json_array,
    "rows.csv": comma_separated,
    "rows.tsv": tab_separated,
    "rows.parquet": parquet,
}
"""How rows of text are written, by a file's name."""
WRITERS |= {
    f"{name}.gz": lambda rows, write=write: gzip.compress(write(rows), 1)  # type: ignore[misc]
    for name, write in WRITERS.items()
    if write is not parquet
}


def put(folder: Path, name: str, payload: bytes) -> Path:
    path = folder / name
    path.write_bytes(payload)
    return path


def rows_in(path: Path, *, limits: Limits | None = None) -> tuple[list[tuple[int, Any]], list[Problem]]:
    """(line, record) of every row that can be read, and everything said; a refusal ends the list."""
    rows: list[tuple[int, Any]] = []
    problems: list[Problem] = []
    try:
        for _, record, source in read(
            [DataFile(path=str(path))], limits=limits or Limits(), on_problem=problems.append
        ):
            rows.append((source.line, record))
    except DataError as error:
        problems += error.problems
    return rows, problems


def examples_in(
    *paths: Path, task: TaskName | None = None, answered: bool = True, **options: Any
) -> tuple[list[Example], list[Problem]]:
    """Examples of files, and everything said about them. `options` are those of the section `data`."""
    data = Data(train=tuple(DataFile(path=str(path)) for path in paths), **options)
    found: list[Example] = []
    problems: list[Problem] = []
    try:
        found += [example for _, example in examples(data.train, data, problems.append, task=task, answered=answered)]
    except DataError as error:
        problems += error.problems
    return found, problems


def said(problems: Sequence[Problem]) -> list[tuple[str, int]]:
    return [(problem.code, problem.source.line) for problem in problems]


def only_row(encoded: Encoded) -> Row:
    """The row that an example became."""
    (row,) = encoded
    assert isinstance(row, Row), row
    return row


def only_problem(encoded: Encoded) -> Problem:
    """What is said of an example that became none."""
    (problem,) = encoded
    assert isinstance(problem, Problem), problem
    return problem
