"""The event log of a run: one JSON object a line, appended by one writer, read by anybody at any time."""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

from tunesmith.errors import RunError
from tunesmith.runs.atomic import from_json, storing, to_json, writing
from tunesmith.types import Event, JsonObject, Record

LoggedState = Literal["new", "stopped", "failed", "done", "interrupted"]

_DURABLE = {"checkpoint", "snapshot", "stopped", "failed", "end"}
_MEASURES = {"evaluation", "sample", "answers", "general"}
_DONE_AGAIN = _MEASURES | {"step", "checkpoint", "snapshot", "stopped", "failed", "end"}
_ENDS: dict[str, LoggedState] = {"stopped": "stopped", "failed": "failed", "end": "done"}
_KIND_AT = len('{"kind":"')


def append(path: Path, event: Event) -> None:
    """Append one line. It survives this process; checkpoints and ends survive a power cut too.

    Raises StorageError if the disk refuses; the next `append` drops a partial line.
    """
    fields = {"kind": event.kind, "step": event.step, "time": event.time}
    line = to_json({**fields, "values": event.values, "timing": event.timing}) + b"\n"
    with storing(path, num_bytes=len(line)), open(path, "a+b", buffering=0) as file:
        _drop_half_line(file)
        written = 0
        while written < len(line):
            written += os.write(file.fileno(), line[written:])
        if event.kind in _DURABLE:
            os.fsync(file.fileno())


def read(path: Path) -> Iterator[Event]:
    """Yield every event, oldest first. A partial last line, left by a killed writer, is not an event.

    Raises RunError naming a complete line that is not an event.
    """
    for number, line in enumerate(_whole_lines(path), start=1):
        yield _event(line, f"{path}:{number}")


@dataclass
class Tail:
    """The events of a log that grows, each once. Those that a resumed run takes back (`truncate_after`) come
    again when they are written again."""

    path: Path
    _seen: array[int] = field(default_factory=lambda: array("q"))
    """Hashes of the lines that were read."""
    _last: bytes = b""
    offset: int = 0  # bytes that were read

    def read(self) -> Iterator[Event]:
        """Yield the events since the last call, up to a line that is not an event."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:  # and closed again: Windows replaces no open file
            file.seek(self.offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._find_place(file)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._add(line)
                yield _event(line, str(self.path))

    def _add(self, line: bytes) -> None:
        self._seen.append(hash(line))
        self._last = line
        self.offset += len(line)

    def _find_place(self, file: BinaryIO) -> None:
        """Go to the end of the lines that were seen, in a file from which some of them may be gone."""
        seen, self._seen, self._last, self.offset, at = self._seen, array("q"), b"", 0, 0
        file.seek(0)
        for line in file:
            try:
                at = seen.index(hash(line), at) + 1
            except ValueError:
                break
            self._add(line)
        file.seek(self.offset)


def follow(path: Path, stop: Callable[[], bool], *, poll_s: float = 0.2) -> Iterator[Event]:
    """Yield every event so far and each new one as it comes, once each, until `stop()` and nothing is left."""
    tail, stopping = Tail(path), False
    while not stopping:
        stopping = stop()
        yield from tail.read()
        if not stopping:
            time.sleep(poll_s)


def truncate_after(path: Path, step: int) -> int:
    """Drop the events that a run resumed from the checkpoint of `step` will write again; return their number.

    Steps, evaluations, checkpoints, samples and ends past `step` go, and measurements at `step` after its
    checkpoint; starts, plans, notes and resumes stay. With `step` below 0 the run starts over, so starts and
    plans go too. The file is replaced as a whole: a kill leaves the old or the new one.
    """
    if not path.exists():
        return 0
    done_again = _DONE_AGAIN if step >= 0 else _DONE_AGAIN | {"start", "plan"}
    num_dropped = 0
    checkpoint_passed = False
    with writing(path) as file:
        for number, line in enumerate(_whole_lines(path), start=1):
            event = _event(line, f"{path}:{number}")
            is_last_look = event.values.get("name") == "after"  # it follows the last checkpoint, logged or not
            measured_after = event.kind in _MEASURES and event.step == step and (checkpoint_passed or is_last_look)
            if (event.step > step and event.kind in done_again) or measured_after:
                num_dropped += 1
            else:
                file.write(line)
            checkpoint_passed |= event.kind == "checkpoint" and event.step == step
    return num_dropped


def digest(path: Path, num_bytes: int = -1) -> JsonObject:
    """Size and SHA-256 of a log, or of its first `num_bytes`, for a checkpoint."""
    content = b""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        content = file.read(num_bytes)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def refuse_changed(path: Path, saved: Record) -> None:
    """Raise RunError where a log does not begin with what a checkpoint `saved` of it by `digest`."""
    if digest(path, saved["bytes"]) != saved:
        raise RunError(
            f"{path}: its first {saved['bytes']:,} bytes are not those that the newest checkpoint recorded: "
            "lines were lost or changed since, by hand or by the disk. Put the file back from a copy, or start "
            "a new run."
        )


def logged_state(path: Path) -> LoggedState:
    """Derive the state of a run from its events; "interrupted": it started and logged no end.

    Only the kinds are read: a million events take a second.
    """
    result: LoggedState = "new"
    for line in _whole_lines(path):
        kind = line[_KIND_AT : line.find(b'"', _KIND_AT)].decode("ascii", "replace")
        if kind in _ENDS:
            result = _ENDS[kind]
        elif result == "new" or kind in ("start", "resume"):
            result = "interrupted"
    return result


def newest(path: Path) -> Event | None:
    """The last event of a log. Raises RunError if that line is none."""
    lines = deque(_whole_lines(path), maxlen=1)
    return _event(lines[0], str(path)) if lines else None


def _event(line: bytes, where: str) -> Event:
    try:
        return Event(**from_json(line))
    except (ValueError, TypeError) as error:
        raise RunError(f"{where}: not an event ({error}): the file was changed by hand or by a fault.") from error


def _whole_lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        with open(path, "rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def _drop_half_line(file: BinaryIO) -> None:
    """Cut a partial last line, so that the next event does not join it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
