"""Standard streams that cannot end a run, and the consoles and JSON lines written to them."""

from __future__ import annotations

import codecs
import errno
import io
import json
import os
import re
import select
import sys
from typing import IO, Any

import orjson
from rich.console import Console

from tunesmith.types import Record


class _Lasting(io.FileIO):
    """A descriptor whose errors are remembered instead of raised; output that it cannot take is dropped."""

    lost: OSError | None = None

    def write(self, data: object, /) -> int:
        try:
            while (written := super().write(data)) is None:  # type: ignore[arg-type]
                select.select([], [self], [])  # a terminal or pipe that somebody set to answer at once
            return written
        except OSError as error:
            self.lost = self.lost or error
            return memoryview(data).nbytes  # type: ignore[arg-type]


def prepare_streams() -> None:
    """Put streams that cannot fail in place of Python's, and the null device where one was closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened gets what is printed
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8")
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


def lost_output(stream: IO[str]) -> OSError | None:
    """Why not all that was printed is there; None: it is."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Lasting) else None


def closing_words() -> str:
    """The last line if output was lost; empty if all is written, or if the reader has closed the pipe."""
    sys.stdout.flush()
    lost = lost_output(sys.stdout)
    if lost is None or lost.errno == errno.EPIPE:
        return ""
    return f"stdout: {lost.strerror}: not all of the output could be written. Everything else was done."


def _lasting(stream: IO[str] | None, descriptor: int) -> IO[str]:
    encoding = getattr(stream, "encoding", "utf-8")
    is_drawn = stream is not None and stream.isatty()
    if stream is not None:
        stream.flush()
    if stream is not None and is_drawn and sys.platform == "win32":  # its console takes UTF-16 by another call
        return stream
    raw = _Lasting(descriptor, "w", closefd=False)
    by_line = is_drawn or descriptor == 2
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=by_line
    )


PLAIN_WIDTH = 100_000
"""Nobody wraps what is not read on a screen: `grep` finds whole lines."""


def console(*, stderr: bool = False) -> Console:
    """A console that draws on a terminal, else writes plain lines; NO_COLOR and TERM=dumb are honoured."""
    file: IO[str] = sys.stderr if stderr else sys.stdout
    drawn = is_drawn(file)
    return Console(
        file=file,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=not drawn,
        width=None if drawn else PLAIN_WIDTH,
        force_terminal=None if drawn else False,
        legacy_windows=False,
    )


def is_drawn(file: IO[str]) -> bool:
    """Whether boxes, colours and live displays are wanted: a terminal that can move its cursor."""
    return file.isatty() and os.environ.get("TERM", "") != "dumb"


def json_line(value: Any) -> None:
    """One JSON value on a line of stdout, at once: the form of every `--json`."""
    from tunesmith.runs.atomic import to_json

    sys.stdout.write(_written(to_json(value).decode()) + "\n")
    sys.stdout.flush()


def data_line(value: Record) -> None:
    """One row of data on a line of stdout, as plain JSON: what the row says is not changed in any way.

    Raises OSError where stdout takes no more: rows that nobody has are not worth computing.
    """
    sys.stdout.write(_written(orjson.dumps(value).decode()) + "\n")
    sys.stdout.flush()
    refuse_lost()


def refuse_lost() -> None:
    """Raise OSError where stdout takes no more; for what is only worth doing while somebody reads it."""
    if lost := lost_output(sys.stdout):
        raise OSError(lost.errno, lost.strerror, "stdout")


def _written(text: str) -> str:
    """JSON in characters that stdout's encoding has; the others as the escapes that JSON has for them."""
    if codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8":
        return text
    return re.sub("[^\x00-\x7f]", lambda found: json.dumps(found.group())[1:-1], text)
