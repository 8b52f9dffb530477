"""Folders of documents or of files of rows: the files in them, in an order that depends on their names alone."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence

from tunesmith.data.columns import names
from tunesmith.data.findings import refusal
from tunesmith.data.kinds import DOCUMENTS, NAMED, suffix_of
from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataFile
from tunesmith.types import Problem, Source

_HELD_OUT = re.compile(r"(.*[-_.])?(test|valid|validation|val|dev|eval|held[-_]?out)[-_.]")


def expand(files: Sequence[DataFile], on_problem: Callable[[Problem], None]) -> tuple[DataFile, ...]:
    """The files, each folder replaced by the documents in it, or by its files of rows, which take its weight.

    Documents end in .txt or .md; beside files of rows, a README is none. Hidden files and folders are left out; all
    others are named in one warning a folder.

    Raises:
        DataError: a folder cannot be listed, or holds nothing to read, or held-out files beside others; all such
            folders are named.
    """
    found: list[DataFile] = []
    refused: list[Problem] = []
    for file in files:
        if not os.path.isdir(file.at):
            found.append(file)
            continue
        try:
            for name in _documents(file.path, file.at, on_problem):
                document = file.model_copy(update={"path": os.path.join(file.path, name)})
                found.append(document.at_place(os.path.join(file.at, name)))
        except DataError as error:
            refused += error.problems
    if refused:
        raise DataError("\n".join(map(str, refused)), refused)
    return tuple(found)


def _documents(folder: str, at: str, on_problem: Callable[[Problem], None]) -> list[str]:
    """Their paths from the folder on, which is read `at` a place."""
    listed = sorted(_walk(at), key=lambda name: name.split(os.sep))
    documents = [name for name in listed if suffix_of(name) in DOCUMENTS and _is_text(name)]
    rows = [name for name in listed if suffix_of(name) in NAMED and _is_text(name)]
    if rows and all(_is_about(name) for name in documents):
        chosen, what = rows, "files of rows"
        _refuse_held_out(folder, rows)
    else:
        chosen, what = documents, "documents (.txt, .md)"
    others = [os.fsencode(name).decode("utf-8", "replace") for name in listed if name not in set(chosen)]
    if not chosen:
        held = f"It holds {names(others)}." if others else "It is empty."
        message = "this is a folder without a document (.txt, .md) or a file of rows (.jsonl, .csv, .parquet, ...)."
        raise refusal(folder, 1, "is_folder", f"{message} {held}", "Give files by their names.")
    if others:
        counted = "1 file was" if len(others) == 1 else f"{len(others):,} files were"
        message = f"{counted} left out, since the {what} of this folder are read: {names(others)}."
        on_problem(Problem(Source(folder, 1), "left_out", message, "Give files of rows by name.", severity="warning"))
    return chosen


def _is_about(name: str) -> bool:
    """Whether a document is about the data, rather than data."""
    return os.path.basename(name).lower().startswith(("readme", "license", "licence", "changelog", "citation"))


def _refuse_held_out(folder: str, rows: Sequence[str]) -> None:
    """Raise `DataError` where files of a folder are held-out rows by their names: they would be trained."""
    held = [name for name in rows if _HELD_OUT.match(os.path.basename(name).lower())]
    if held and len(held) < len(rows):
        message = f"by their names, files of this folder are held-out rows: {names(held)}. They would be trained."
        others = " ".join(shlex.quote(os.path.join(folder, name)) for name in rows if name not in held)
        fix = f"Give the files by name: {others} --eval {shlex.quote(os.path.join(folder, held[0]))}"
        raise refusal(folder, 1, "is_folder", message, fix)


def _walk(folder: str) -> Iterator[str]:
    """Every file that is not hidden, by its path from the folder on."""

    def refuse(error: OSError) -> None:
        raise refusal(str(error.filename), 1, "unreadable", f"the folder cannot be listed: {error.strerror}.")

    for here, folders, members in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(here, name), folder) for name in members if not name.startswith("."))


def _is_text(name: str) -> bool:
    """Whether a name can be written: some file systems hold names that are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
