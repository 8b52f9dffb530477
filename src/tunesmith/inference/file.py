"""A file of rows to a file of answers: begun, gone on with, or streamed."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import cast

from tunesmith.data.folders import expand
from tunesmith.data.opening import FileFacts
from tunesmith.errors import InputError
from tunesmith.inference.inputs import read_file, read_pipe
from tunesmith.inference.lines import Line, Lines, Tally
from tunesmith.inference.output import Output
from tunesmith.inference.predictor import Predictor
from tunesmith.recipe.schema import DataFile
from tunesmith.runs.atomic import sha256_file

STDIN = "-"
Progress = Callable[[int, int], None]
"""Lines of the file that are done, and all."""


def predict_to(
    out: Path,
    predictor: Predictor,
    path: str,
    *,
    bare: bool = False,
    keep: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Answers to all rows of a file, in the file `out`. What an earlier call left of it is gone on with, and counted.

    Raises:
        InputError: `out` holds something else, was made from another file or model, or is the file itself.
        DataError: the file, or what is left of it, cannot be read; the lines before are kept. StorageError.
    """
    if path == STDIN:
        raise InputError("predict: --out needs a file of rows: what comes through a pipe cannot be gone on with.")
    if out.exists() and Path(path).exists() and out.samefile(path):
        raise InputError(f"{out}: these are the rows themselves. Choose another --out.")
    output = Output.open(out, identity_of(predictor, path, bare=bare, keep=keep), kept=keep, overwrite=overwrite)
    if output.is_complete:
        output.close()
        say(f"{out}: complete already")
        return Tally(answered=output.num_lines - output.num_errors, errors=output.num_errors)
    try:
        if output.num_lines:
            say(f"{out}: goes on after {output.num_lines:,} rows")
        lines = _stream(
            predictor, path, output.write, bare=bare, keep=keep, skip=output.num_lines, progress=progress, say=say
        )
        if str(lines.last_skipped or "") != output.last_source:
            raise InputError(f"{out}: its last line is not of {lines.last_skipped}. Start anew with --overwrite.")
        output.finish()
    finally:
        output.close()
    lines.tally.errors += output.num_errors
    lines.tally.answered += output.num_lines - output.num_errors
    return lines.tally


def identity_of(predictor: Predictor, path: str, *, bare: bool, keep: Sequence[str] = ()) -> dict[str, str]:
    """What the lines follow from, by name: hashes of rows, model and renderer, and every option."""
    found = expand([DataFile(path=path)], lambda warning: None)
    # A file that is none is named when it is read. Its path is part of every line, as the source.
    hashes = [f"{file.path} {sha256_file(Path(file.path))}\n" for file in found if Path(file.path).is_file()]
    rows = hashlib.sha256("".join(hashes).encode("utf-8", "surrogateescape")).hexdigest()
    fields = ", ".join(["bare" if bare else "echoed", *keep, "reference"])
    return {**predictor.identity(), "fields": fields, "rows": rows}


def predict_stream(
    write: Callable[[Sequence[Line]], None],
    predictor: Predictor,
    path: str,
    *,
    bare: bool = False,
    keep: Sequence[str] = (),
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Tally:
    """The same for a file or for "-", the standard input, with the lines handed on as they come."""
    return _stream(predictor, path, write, bare=bare, keep=keep, skip=0, progress=progress, say=say).tally


def _stream(
    predictor: Predictor,
    path: str,
    write: Callable[[Sequence[Line]], None],
    *,
    bare: bool,
    keep: Sequence[str],
    skip: int,
    progress: Progress,
    say: Callable[[str], None],
) -> Lines:
    data = predictor.speaker.recipe.data
    facts: list[FileFacts] = []

    def tick(within: int, of_chunk: int) -> None:
        if facts:
            progress(*_position(facts[-1], left=of_chunk - within))

    lines = Lines(predictor, write, chunk_rows=predictor.chunk_rows, bare=bare, skip=skip, tick=tick)
    if path == STDIN:
        read_pipe(cast(BufferedIOBase, sys.stdin.buffer), data, predictor.task, lines, say, keep=keep)
    else:
        read_file(path, data, predictor.task, lines, facts, keep=keep)
    lines.flush()
    return lines


def _position(facts: FileFacts, *, left: int) -> tuple[int, int]:
    """Bytes of the file that are done, and all, where `left` of the rows that are read wait for their answer."""
    read = max(facts.rows, 1)
    return round(facts.done_bytes * (read - left) / read), facts.total_bytes
