"""Runs that pages start: `tunesmith train` and `resume` in processes of their own, which outlive the server.

A process holds a lock file next to its run folder and prints into a file there, so that a server that is
started again finds what an earlier one began, and why it ended where there is no run folder yet.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.environment.process import CARD_SHARE
from tunesmith.errors import TunesmithError
from tunesmith.jobs.launcher import ChildProcess, start_child
from tunesmith.runs.folder import Run, slug
from tunesmith.serve.protocol import RequestError
from tunesmith.types import JsonObject, Record

OUTPUT = re.compile(r"\.(?P<run>[^/]+)\.output")
RESUMABLE = ("stopped", "interrupted", "failed", "new")
WHOLE_CARD = {CARD_SHARE: "1"}
ENDS_S = 3.0
"""Time for a killed process to be gone."""
ENDED_SILENTLY = "its process ended without a word: it was killed, or memory ran out."


@dataclass(frozen=True)
class Wanted:
    """A new run as a person chose it."""

    model: str
    data: str
    settings: tuple[tuple[str, str], ...] = ()
    """Options by key, as they were typed."""

    def words(self) -> list[str]:
        """The words after `tunesmith train` and `plan`. Raises RequestError."""
        return [argument("model", self.model), argument("data", self.data), *set_words(self.settings)]


def argument(name: str, value: str) -> str:
    """The value as a command's argument. Raises RequestError for one that is empty or reads as an option."""
    if not value.strip() or value.startswith("-") or "\0" in value:
        raise RequestError(f"{name}: {value[:100]!r}: give one from the list.", param=name)
    return value


def set_words(settings: Iterable[tuple[str, str]]) -> list[str]:
    """The words that set options. Raises RequestError for a key that is no name of an option."""
    pairs = sorted(settings)
    for key, value in pairs:
        if not re.fullmatch(r"[a-z_][a-z_0-9.]*", key) or "\0" in value:
            raise RequestError(f"{key[:60]}: is no name of an option.", param=key[:60])
    return [word for key, value in pairs for word in ("--set", f"{key}={value}")]


def start(root: Path, wanted: Wanted, *, offline: bool) -> JsonObject:
    """Start a run; returns its name. Raises RequestError."""
    words = ["train", *wanted.words(), *(["--offline"] if offline else [])]
    name = f"{slug(Path(wanted.data).name.split('.')[0])}-{secrets.token_hex(2)}"
    start_process(root / name, [*words, "--out", str(root / name), "--json"])
    return {"name": name}


def resume(run: Run, settings: Iterable[tuple[str, str]] = (), *, offline: bool) -> JsonObject:
    """Let a run go on, with other options. Raises RequestError: 409 where there is nothing to resume."""
    state = run.state()
    if state not in RESUMABLE:
        raise RequestError(
            f"{run.path.name}: it is {state}, so there is nothing to resume.", status=409, code="conflict"
        )
    words = ["resume", str(run.path), *set_words(settings), *(["--offline"] if offline else [])]
    start_process(run.path, [*words, "--json"])
    return {"name": run.path.name}


def stop(run: Run) -> JsonObject:
    """Let a run stop after its step, with a checkpoint. Raises RequestError 409 for one that is not at work."""
    if not run.is_locked():
        message = f"{run.path.name}: it is {run.state()}: no process works on it."
        raise RequestError(message, status=409, code="conflict")
    try:
        run.ask_stop()
    except TunesmithError as error:
        raise RequestError(str(error), status=409, code="conflict") from error
    return {"name": run.path.name, "is_stopping": True}


def stop_starting(run: Path) -> JsonObject:
    """End the process of a run that has no folder yet, and forget it: nothing is lost. Raises
    RequestError 409 for one that does not end."""
    child, until = ChildProcess(run), time.monotonic() + ENDS_S
    child.stop()
    while child.is_alive() and time.monotonic() < until:
        time.sleep(0.05)
    forget(run)
    return {"name": run.name, "is_stopping": True}


def start_process(run: Path, words: Sequence[str], *, says: bool = False) -> None:
    """Start a command that is known by files next to `run`. Raises RequestError 409 where one works."""
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        start_child(run, "tunesmith", words, WHOLE_CARD, says=says)
    except BlockingIOError as error:
        message = f"{run.name}: it is at work already."
        raise RequestError(message, status=409, code="conflict") from error
    except OSError as error:
        message = f"{run.name}: cannot be started: {error.strerror}."
        raise RequestError(message, status=507, code="storage") from error


def starting_runs(root: Path) -> Iterator[JsonObject]:
    """{name, state, error} of the runs that were started here and have no folder yet: "starting", or
    "not started" with what their process printed last."""
    for run in _started(root):
        if not (run / "run.json").exists():
            child = ChildProcess(run)
            state = "starting" if child.is_alive() else "not started"
            error = None if state == "starting" else child.error() or {"message": ENDED_SILENTLY}
            yield {"name": run.name, "state": state, "error": error}


def starting(root: Path, name: str) -> JsonObject | None:
    """The row of `starting_runs` with that name."""
    return next((row for row in starting_runs(root) if row["name"] == name), None)


def busy(root: Path) -> list[str]:
    """Names of runs on which a process that was started here works, or is about to."""
    return [run.name for run in _started(root) if ChildProcess(run).is_alive()]


def _started(root: Path) -> Iterator[Path]:
    for path in sorted(root.glob(".*.output")) if root.is_dir() else ():
        if match := OUTPUT.fullmatch(path.name):
            yield root / match["run"]


def forget(run: Path) -> None:
    """Remove what is left of a run that did not start. Raises RequestError 409 while it may."""
    child = ChildProcess(run)
    if (run / "run.json").exists() or child.is_alive():
        raise RequestError(f"{run.name}: is at work, or has a folder.", status=409, code="conflict")
    child.forget()


def resuming(run: Run) -> tuple[bool, Record | None]:
    """Whether a process of a page is about to go on with a run, and why one that was to did not."""
    child, output = ChildProcess(run.path), run.path.parent / f".{run.path.name}.output"
    if child.is_alive():
        return not run.is_locked() and run.state() != "done", None
    try:
        is_newer = output.stat().st_mtime > run.events_path.stat().st_mtime
    except OSError:
        return False, None
    error = child.error() if is_newer else None
    return False, error if error and error.get("code") != "Stopped" else None
