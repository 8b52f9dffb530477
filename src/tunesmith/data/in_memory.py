"""Rows of a program, written to a file: the data must be there when a run is resumed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from tunesmith.errors import DataError
from tunesmith.runs.atomic import write_atomic
from tunesmith.types import Record

FIELDS_OF_FILES = {"path", "weight"}
IN_MEMORY = re.compile(r"rows-[0-9a-f]{12}\.jsonl")
"""Names of files that `write_rows` writes."""


def is_rows(given: object) -> bool:
    """Whether `given` is rows: a pandas or `datasets` table, or a list of mappings but {"path", "weight"}."""
    if isinstance(given, (str, bytes, Mapping)):
        return False
    if (hasattr(given, "iloc") and hasattr(given, "columns")) or hasattr(given, "column_names"):  # no Series
        return True
    if not isinstance(given, (list, tuple)) or not given:
        return False
    kinds = [isinstance(row, Mapping) and not ("path" in row and set(row) <= FIELDS_OF_FILES) for row in given]
    if any(kinds) and not all(kinds):
        i = kinds.index(not kinds[0])
        raise DataError(f"item {i} of the list is a {'row' if kinds[i] else 'file'}, item 0 is not. Give one or other.")
    return all(kinds)


def write_rows(rows: object, folder: Path) -> Path:
    """`rows` as a JSONL file in `folder`, named by its content: the same rows are the same file.

    Missing values of a table (NaN, NaT) are left out. Raises DataError naming the row and the field that JSON
    cannot hold.
    """
    lines = b"".join(_line(i, row) + b"\n" for i, row in enumerate(_records(rows)))
    if not lines:
        raise DataError("there are no rows: the table is empty.")
    path = folder / f"rows-{hashlib.sha256(lines).hexdigest()[:12]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != lines:
        write_atomic(path, lines)
    return path


def _records(rows: Any) -> Iterable[Record]:
    if hasattr(rows, "iloc"):  # pandas
        if not rows.columns.is_unique:
            twice = rows.columns[rows.columns.duplicated()][0]
            raise DataError(f"column {twice}: the table has several columns of this name. Give each its own.")
        rows = rows.astype(object).where(rows.notna(), None).to_dict("records")
    elif not hasattr(rows, "column_names"):  # as a table of `datasets` has
        return list(rows)
    return ({k: v for k, v in row.items() if v is not None} for row in rows)


def _line(i: int, row: Record) -> bytes:
    for name, value in row.items():
        if not isinstance(name, str):
            raise DataError(f"row {i}: its field {name!r} is named by a {type(name).__name__}. Name fields by text.")
        try:
            orjson.dumps(value, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {i}: field {name}: {type(value).__name__} {value!r:.60} cannot be written as JSON "
                f"({error}). Turn it into text or a number."
            ) from None
    return orjson.dumps(dict(row), default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.ndarray):  # of texts or mappings, as pandas reads a list from Parquet
        return value.tolist()
    raise TypeError("no such type in JSON")
