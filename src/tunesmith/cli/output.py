"""Where words go: answers to stdout, progress and problems to stderr when stdout belongs to a machine."""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
from collections.abc import Mapping
from typing import IO, Any

import orjson
from rich.console import Console

from tunesmith.cli.streams import lost_output

PLAIN_WIDTH = 100_000
"""Nobody wraps what is not read on a screen: `grep` finds whole lines."""


def console(*, stderr: bool = False) -> Console:
    """A console that draws on a terminal and writes plain lines elsewhere; NO_COLOR and TERM=dumb are honoured."""
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


def json_line(value: Mapping[str, Any]) -> None:
    """One JSON object on a line of stdout, at once."""
    from tunesmith.runs.atomic import to_json

    sys.stdout.write(_written(to_json(value).decode()) + "\n")
    sys.stdout.flush()


def data_line(value: Mapping[str, Any]) -> None:
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


def json_page(value: Any) -> str:
    """JSON to read: indented, one value."""
    return _written(orjson.dumps(value, option=orjson.OPT_INDENT_2, default=str).decode())


def _written(text: str) -> str:
    """JSON in characters that stdout's encoding has; the others as the escapes that JSON has for them."""
    if codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8":
        return text
    return re.sub("[^\x00-\x7f]", lambda found: json.dumps(found.group())[1:-1], text)
