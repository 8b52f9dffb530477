"""The processes that send to trackers, as a command has them."""

from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from tunesmith.runs.folder import Run
from tunesmith.trackers.sender import tracked


@contextmanager
def begun(
    name: str, run: Run | None = None, *, offline: bool = False, wait_s: float | None = None
) -> Iterator[list[tuple[bool, str]]]:
    """A block in which a run is sent, if there is one; the lines that are said."""
    said: list[tuple[bool, str]] = []
    with tracked([name], offline=offline, say=lambda *line: said.append(line), wait_s=wait_s) as begin:
        if run is not None:
            begin(run)
        yield said


def finish(name: str, run: Run) -> str:
    """Send a run; the line that says so."""
    with begun(name, run) as said:
        pass
    is_sent, line = said[-1]
    assert is_sent, said
    return line


def processes() -> list[psutil.Process]:
    """Those of trackers, and no zombies."""
    found = psutil.Process().children()
    return [one for one in found if one.status() != "zombie" and "tunesmith.trackers.sender" in one.cmdline()]


def process_of(name: str) -> psutil.Process:
    """The one process of a tracker."""
    (found,) = [one for one in processes() if name in one.cmdline()]
    return found
