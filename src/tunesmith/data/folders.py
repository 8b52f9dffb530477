"""Folders of documents: the files in them, in an order that depends on their names alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from tunesmith.data.columns import names
from tunesmith.data.findings import refusal
from tunesmith.data.kinds import DOCUMENTS, suffix_of
from tunesmith.errors import DataError
from tunesmith.recipe.knobs import DataFile
from tunesmith.types import Problem, Source


def expand(files: Sequence[DataFile], on_problem: Callable[[Problem], None]) -> tuple[DataFile, ...]:
    """The files, each folder replaced by the documents in it, which take its weight.

    Documents end in .txt or .md. Hidden files and folders are left out; all others are named in one warning a folder.

    Raises:
        DataError: a folder cannot be listed, or holds no document; all such folders are named.
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
    documents, others = [], []
    for name in sorted(_walk(at), key=lambda name: name.split(os.sep)):
        if suffix_of(name) in DOCUMENTS and _is_text(name):
            documents.append(name)
        else:
            others.append(os.fsencode(name).decode("utf-8", "replace"))
    if not documents:
        held = f"but {names(others)}" if others else "and nothing else"
        message = f"this is a folder without a document: it holds no .txt or .md file, {held}."
        raise refusal(folder, 1, "is_folder", message, "Give files of rows themselves, by their names.")
    if others:
        message = f"{len(others):,} files are no documents (.txt, .md) and were left out: {names(others)}."
        on_problem(Problem(Source(folder, 1), "left_out", message, "Give files of rows by name.", severity="warning"))
    return documents


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
