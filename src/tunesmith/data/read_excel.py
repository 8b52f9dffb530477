"""The first sheet of an Excel file, row by row: values are text, as Excel would write them into a CSV file."""

from __future__ import annotations

import datetime
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

from tunesmith.data.detect_format import FileFacts, distinct, open_packed
from tunesmith.data.problems import refusal
from tunesmith.data.read_json import BadRow, OnBadRow, nul_character, too_long
from tunesmith.environment.packages import install_command
from tunesmith.errors import DataError
from tunesmith.recipe.schema import Limits

MOST_UNPACKED, MOST_SHARED = 2**30, 2**27
"""Bytes that all parts of a file may have unpacked, and those held whole while it is read: texts, styles."""
MOST_SHEET_ROWS, MOST_SHEET_COLUMNS = 1_048_576, 16_384
"""Excel's own limits."""
MOST_CELLS = 100_000_000
"""Cells of all rows, empty ones too: a row can name its last column alone."""
_AS_CSV = "Save the sheet as CSV."


def excel_rows(facts: FileFacts, *, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row's number in the sheet and values by column; formulas have the values that Excel last computed.
    Empty rows are left out.

    Raises `DataError` where the file is damaged or too large, and where openpyxl is not installed.
    """
    with open_packed(facts) as stream:
        for number, cells in _sheet(facts, stream):
            facts.line = number
            facts.done_bytes = facts.total_bytes // 2  # a sheet does not say how many rows it has
            texts = [_text(cell) for cell in cells]
            while texts and not texts[-1].strip():
                texts.pop()
            if not texts:
                continue
            if facts.columns is None:
                named = [text.strip() or f"column {place}" for place, text in enumerate(texts, start=1)]
                facts.columns = distinct(facts, named, number)
                continue
            facts.rows += 1
            if (bad := _finding(texts, len(facts.columns), limits)) is not None:
                on_bad(number, bad)
                continue
            texts += [""] * (len(facts.columns) - len(texts))
            yield number, dict(zip(facts.columns, texts, strict=True))


def _sheet(facts: FileFacts, stream: Any) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Numbers, from 1, and cells of all rows of the first sheet."""
    try:
        import openpyxl
    except ImportError:
        message = "this is an Excel file, which openpyxl reads, and that is not installed."
        way = f"{_AS_CSV[:-1]}, or: {install_command('excel')}"
        raise refusal(facts.path, 0, "archive", message, way) from None
    warnings.filterwarnings("ignore", module="openpyxl")  # of extensions of Excel that hold no values
    num_cells = 0
    try:
        _refuse_large(facts, stream)
        book = openpyxl.load_workbook(stream, read_only=True, data_only=True, keep_links=False)
        if not book.worksheets:
            raise refusal(facts.path, 0, "empty_dataset", "it has no sheet with cells.", "Give a file with rows.")
        sheet = book.worksheets[0]
        facts.sheets = (sheet.title, *(other.title for other in book.worksheets[1:]))
        sheet.reset_dimensions()  # what a file says of its size is not believed
        for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
            num_cells += len(cells)
            if number > MOST_SHEET_ROWS or len(cells) > MOST_SHEET_COLUMNS or num_cells > MOST_CELLS:
                message = f"its sheet {sheet.title!r} is larger than a sheet can be, or nearly empty."
                raise refusal(facts.path, number, "sheet_too_large", message, _AS_CSV)
            yield number, cells
    except (DataError, MemoryError):
        raise
    except Exception as error:  # openpyxl raises whatever its parsers meet
        reason = " ".join(str(error).split())[:120]
        message = f"the Excel file is damaged ({type(error).__name__}: {reason})."
        raise refusal(facts.path, facts.line + 1, "damaged_excel", message, "Save it again.") from None


def _refuse_large(facts: FileFacts, stream: Any) -> None:
    with zipfile.ZipFile(stream) as parts:  # which unpacks no more than it says
        sizes = {part.filename: part.file_size for part in parts.infolist()}
    shared = sum(size for name, size in sizes.items() if not name.startswith(("xl/worksheets/", "xl/media/")))
    if sum(sizes.values()) > MOST_UNPACKED or shared > MOST_SHARED:
        raise refusal(facts.path, 0, "sheet_too_large", "it unpacks to more than is read of an Excel file.", _AS_CSV)
    stream.seek(0)


def _finding(texts: list[str], num_columns: int, limits: Limits) -> BadRow | None:
    if len(texts) > num_columns:
        message = f"it has {len(texts)} values, the header names {num_columns}"
        return BadRow("ragged_row", message, "Name the column in the first row, or empty the cell.")
    if any("\0" in text for text in texts):
        return nul_character(0)
    size = sum(len(text.encode()) for text in texts)
    return too_long(size, limits.line_bytes) if size > limits.line_bytes else None


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).upper()
    if isinstance(cell, float):
        return f"{cell:.15g}"
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return str(cell)
