"""Reads files and folders of rows: streamed, byte for byte, each row with its place. See docs/guide/data.md."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from glob import has_magic
from typing import Any

from tunesmith.data.addresses import is_address, known, local, registered
from tunesmith.data.detect_format import (
    DOCUMENTS,
    SUFFIXES,
    FileFacts,
    FileFormat,
    inspect_file,
    is_about,
    is_text_file,
    open_text,
    suffix_of,
)
from tunesmith.data.problems import describe_type, names, refusal
from tunesmith.data.read_json import BadRow, OnBadRow, json_array, json_lines
from tunesmith.data.read_text import conll_sentences, document
from tunesmith.errors import DataError
from tunesmith.recipe.schema import AS_IT_IS, DataFile, Limits, Reading
from tunesmith.types import JsonObject, Problem, Source

MOST_OPENED = 20
"""Files of a folder that are opened to see whether they may be documents."""
_HELD_OUT = re.compile(r"(.*[-_.])?(test|valid|validation|val|dev|eval|held[-_]?out)[-_.]")


def expand_folders(
    files: Sequence[DataFile], on_problem: OnProblem, *, trained: bool = False, how: Reading = AS_IT_IS
) -> tuple[DataFile, ...]:
    """The files, each folder replaced by the documents in it, or by its files of rows, which take its weight,
    and each address by the files that it names.

    Documents end in .txt, .md or as `how` says, or where there are none have no suffix; a README next to files
    of rows is not one. Hidden files and folders are left out; all others are named in one warning a folder.

    Raises:
        DataError: a folder cannot be listed, or holds nothing to read, or is `trained` on and holds held-out
            files among others; all such folders are named.
    """
    expanded: list[DataFile] = []
    refused: list[Problem] = []
    for file in files:
        try:
            if is_address(file.at):
                if trained and not has_magic(file.at):  # neither a pattern nor a split
                    _refuse_held_out_at(file.at, [remote.address for remote in registered(file.at)])
                expanded += [
                    file.at_place(remote.cached() or remote.address, path=remote.address)
                    for remote in registered(file.at)
                ]
            elif os.path.isdir(file.at):
                for name in _documents(file.path, file.at, on_problem, trained, how.suffixes):
                    expanded.append(file.at_place(os.path.join(file.at, name), path=os.path.join(file.path, name)))
            else:
                expanded.append(file)
        except DataError as error:
            refused += error.problems
    if refused:
        raise DataError("\n".join(map(str, refused)), refused)
    return tuple(expanded)


def _documents(
    folder: str, at: str, on_problem: Callable[[Problem], None], trained: bool, suffixes: Sequence[str]
) -> list[str]:
    """Their paths from the folder on, which is read `at` a place."""
    models: list[str] = []
    listed = sorted(_walk(at, models), key=lambda name: name.split(os.sep))
    if models:
        message = f"folders of a model or a run were left out: {names(sorted(models))}."
        fix = "If they hold documents of yours, give those by name."
        on_problem(Problem(Source(folder, 0), "left_out", message, fix, severity="warning"))
    writable = [name for name in listed if name.encode("utf-8", "ignore").decode() == name]  # all UTF-8
    documents = [name for name in writable if suffix_of(name) in (*DOCUMENTS, *suffixes)]
    rows = [name for name in writable if suffix_of(name) in SUFFIXES]
    if rows and all(is_about(name) for name in documents):
        chosen, what = rows, "files of rows"
    else:
        chosen, what = documents, "documents (.txt, .md)"
    if not chosen:
        chosen, what = [name for name in writable if not suffix_of(name)], "documents without a suffix"
    if trained:
        _refuse_held_out(folder, chosen, rows if chosen is rows else [])
    others = [os.fsencode(name).decode("utf-8", "replace") for name in listed if name not in set(chosen)]
    if not chosen:
        held = f"It holds {names(others)}." if others else "It is empty."
        message = "this is a folder without a document (.txt, .md) or a file of rows (.jsonl, .csv, .parquet, ...)."
        way = f" or, if they are documents, add {by}" if (by := _by_suffix(at, writable)) else ""
        raise refusal(folder, 0, "is_folder", f"{message} {held}", f"Give files by their names{way}.")
    if others:
        counted = "1 file was" if len(others) == 1 else f"{len(others):,} files were"
        message = f"{counted} left out, since the {what} of this folder are read: {names(others)}."
        way = f", other documents by {by}" if (by := _by_suffix(at, others)) else ""
        fix = f"Give files of rows by name{way}."
        on_problem(Problem(Source(folder, 0), "left_out", message, fix, severity="warning"))
    return chosen


def _by_suffix(at: str, others: Sequence[str]) -> str:
    """The option that takes other files of a folder for documents if they begin like text; "" if none does."""
    ends: dict[str, str] = {}
    for name in others[:MOST_OPENED]:
        end = suffix_of(name)
        with suppress(OSError, DataError):
            if end not in SUFFIXES and end not in ends and is_text_file(os.path.join(at, name)):
                ends[end] = name
    listed = json.dumps([*ends][:4], ensure_ascii=False)
    return f"--set {shlex.quote(f'data.suffixes={listed}')}" if ends else ""


def _refuse_held_out_at(address: str, found: Sequence[str]) -> None:
    """`_refuse_held_out` for the files of a folder at an address, which may be in an archive."""
    _, mark, archive = address.partition("::")
    names = [address_of_file.removesuffix(mark + archive) for address_of_file in found]
    folder = os.path.commonprefix(names).rpartition("/")[0]  # noqa: RUF071
    inside = [name.removeprefix(f"{folder}/").replace("/", os.sep) for name in names]
    _refuse_held_out(folder, inside, [name for name in inside if suffix_of(name) in SUFFIXES], mark + archive)


def _refuse_held_out(folder: str, chosen: Sequence[str], rows: Sequence[str], archive: str = "") -> None:
    """Raise `DataError` where files, or folders next to one named train, are held-out rows by their names."""
    tops = sorted({name.split(os.sep)[0] for name in chosen if os.sep in name})
    held_tops = [top for top in tops if _HELD_OUT.match(f"{top.lower()}.")]
    held_rows = [name for name in rows if _HELD_OUT.match(os.path.basename(name).lower())]
    others = [name for name in rows if name not in held_rows]
    for trained, held in ((others, held_rows), ([top for top in tops if top.lower() == "train"], held_tops)):
        if trained and held:
            ours, theirs = (
                [shlex.quote(os.path.join(folder, at) + archive) for at in side] for side in (trained, held)
            )
            message = f"by their names, these are held-out rows: {names(held)}. They would be trained."
            fix = f"Give by name: {' '.join(ours)} --eval {' --eval '.join(theirs)}"
            raise refusal(folder, 0, "is_folder", message, fix)


def _walk(folder: str, models: list[str]) -> Iterator[str]:
    """Every file that is not hidden, by its path from the folder on. Folders in it that hold a model or a run,
    whose vocabularies and reports are no documents, are not walked: `models` gets their paths."""

    def refuse(error: OSError) -> None:
        raise refusal(str(error.filename), 0, "unreadable", f"the folder cannot be listed: {error.strerror}.")

    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if here != folder and any(together <= {*files} for together in _OF_MODELS):
            models.append(os.path.relpath(here, folder))
            folders.clear()
            continue
        yield from (os.path.relpath(os.path.join(here, name), folder) for name in files if not name.startswith("."))


_OF_MODELS = (
    {"config.json", "tokenizer_config.json"}, {"config.json", "model.safetensors"}, {"adapter_config.json"},
    {"run.json", "events.jsonl"},
)  # fmt: skip
"""Files that together make a folder a model, an adapter or a run."""
OnProblem = Callable[[Problem], None]


def read(
    files: Sequence[DataFile],
    *,
    limits: Limits,
    on_problem: OnProblem,
    facts: list[FileFacts] | None = None,
    how: Reading = AS_IT_IS,
) -> Iterator[tuple[int, JsonObject, Source]]:
    """Index of the file, the row as a dictionary, and its place; row by row, whatever the size of the files.

    A row that cannot be read goes to `on_problem`, and reading continues with the next one. `facts` gets the
    facts of every file and document of a folder, before its first row, and is kept up to date.

    Raises:
        DataError: a file cannot be read, holds no row, or is broken so that nobody can say where its next row
            begins. Files that cannot be opened are named together, before the first row.
    """
    for index, of_address in inspect_files(files, on_problem, how):
        with local(of_address.at) if is_address(of_address.at) else nullcontext("") as local_path:
            of_file = inspect_file(of_address.path, local_path, how) if local_path else of_address
            if facts is not None:
                facts.append(of_file)
            yield from _rows(index, of_file, limits=limits, on_problem=on_problem)


def reread(facts: FileFacts, *, limits: Limits, how: Reading) -> Iterator[JsonObject]:
    """The rows of a file that is being read, from its beginning; none of what is no file. Raises as `read`."""
    if os.path.isfile(place := facts.at or facts.path):
        for _, record, _ in _rows(0, inspect_file(facts.path, place, how), limits=limits, on_problem=lambda said: None):
            yield record


def inspect_files(
    files: Sequence[DataFile], on_problem: OnProblem, how: Reading = AS_IT_IS
) -> list[tuple[int, FileFacts]]:
    """Facts of every file and document of a folder, with its index. Raises a `DataError` for all unreadable."""
    facts_of_files: list[tuple[int, FileFacts]] = []
    refused: list[DataError] = []
    for index, file in enumerate(files):
        try:
            members = expand_folders([file], on_problem, how=how)
        except DataError as error:
            refused.append(error)
            continue
        for member in members:
            if is_address(member.at):
                facts = FileFacts(member.path, "Parquet", total_bytes=known(member.at).num_bytes, at=member.at)
                facts_of_files.append((index, facts))
                continue
            try:
                facts_of_files.append((index, inspect_file(member.path, member.at, how)))
            except DataError as error:
                refused.append(error)
    if refused:
        raise DataError("\n".join(map(str, refused)), [problem for error in refused for problem in error.problems])
    return facts_of_files


_UNITS: dict[FileFormat, str] = {"JSON lines": "line", "CoNLL": "sentence", "text": "document"}


def _rows(
    index: int, facts: FileFacts, *, limits: Limits, on_problem: OnProblem
) -> Iterator[tuple[int, JsonObject, Source]]:
    path = facts.path

    def on_bad(line: int, bad: BadRow) -> None:
        is_known = bad.at is not None and facts.kind not in ("Parquet", "Excel") and not facts.encoding
        place = f" (byte {(bad.at or 0) + 1:,} of the {_UNITS.get(facts.kind, 'row')})" if is_known else ""
        on_problem(Problem(Source(path, line), bad.code, f"{bad.message}{place}.", bad.fix))

    for line, record in _records(facts, limits, on_bad):
        if isinstance(record, dict):
            yield index, record, Source(path, line)
        else:
            message = f"the row is {describe_type(record)}, not an object with named fields."
            on_problem(Problem(Source(path, line), "not_an_object", message, 'Write {"prompt": ..., ...}.'))
    facts.done_bytes = facts.total_bytes
    if others := facts.sheets[1:]:
        message = f"its first sheet was read, {facts.sheets[0]!r}; left out: {names(others)}."
        fix = "Save another sheet as a file of its own to use it."
        on_problem(Problem(Source(path, 0), "left_out", message, fix, severity="warning"))
    if facts.marks:
        message = f"{facts.marks:,} lines hold no word (-DOCSTART- or a comment) and were left out."
        on_problem(Problem(Source(path, 0), "document_marks", message, severity="warning"))
    if facts.rows == 0:
        held = f"no row, only the names of columns: {names(facts.columns)}" if facts.columns else "no row"
        raise refusal(path, 0, "empty_dataset", f"it holds {held}.", "Give a file with rows.")


def _records(facts: FileFacts, limits: Limits, on_bad: OnBadRow) -> Iterator[tuple[int, Any]]:
    if facts.kind == "Excel":
        from tunesmith.data.read_excel import excel_rows

        yield from excel_rows(facts, limits=limits, on_bad=on_bad)
        return
    readers: dict[FileFormat, Callable[..., Iterator[tuple[int, Any]]]] = {
        "JSON lines": json_lines,
        "JSON array": json_array,
        "CoNLL": conll_sentences,
        "text": document,
    }
    if facts.kind in ("CSV", "Parquet"):
        from tunesmith.data.read_table import csv_rows, parquet_rows  # pyarrow: a server of jobs saves 40 MB

        if facts.kind == "Parquet":
            yield from parquet_rows(facts, limits=limits, on_bad=on_bad)
            return
        readers["CSV"] = csv_rows
    reader = readers[facts.kind]
    with open_text(facts) as (stream, packed):
        for record in reader(stream, facts, limits=limits, on_bad=on_bad):
            facts.done_bytes = packed.tell()
            yield record
