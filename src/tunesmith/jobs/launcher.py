"""Runs as child processes: `tunesmith train` or `resume` with a run folder, nothing else between them.

A child holds a lock file from its start to its end, however it ends and however the server does. So a server
that is started again finds the child of an earlier one, and never starts a second.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from tunesmith.environment.children import for_child, python_words
from tunesmith.environment.process import CARD_SHARE, SERVING_SHARE, card_share
from tunesmith.errors import InputError
from tunesmith.runs.folder import Run
from tunesmith.types import JsonObject

NICE = 10
"""Lower priority than the engine, so that answers do not wait for training."""
LEAST_REST = 0.05
"""Less than this of a card holds no run."""
MOST_LAST = 2**26  # bytes at the end of what a child printed that are looked at


@dataclass(frozen=True)
class ChildProcess:
    """A run that is under way, of this server or an earlier one: a process that holds its lock file."""

    run: Path
    popen: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        if self.popen is not None:
            return self.popen.poll() is None
        return _holder(self.run) is not None

    def stop(self) -> None:
        """Let the run stop after its step, with a checkpoint."""
        if (self.run / "run.json").exists():
            Run(self.run).ask_stop()
        elif pid := self.popen.pid if self.popen is not None else _holder(self.run):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it has not made its folder yet: nothing is lost

    def printed(self) -> JsonObject | None:
        """The last line that it printed, as JSON; None: it printed none, or was killed."""
        with suppress(OSError, ValueError), open(_beside(self.run, "output"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_LAST))  # a run prints every event
            last = file.read().strip().rpartition(b"\n")[2]
            message = orjson.loads(last)
            return message if isinstance(message, dict) else None
        return None

    def says(self) -> str:
        """The last line that it said on stderr, where that is kept; empty once it has ended."""
        if self.is_alive():
            with suppress(OSError):
                lines = _beside(self.run, "said").read_bytes()[-4000:].decode("utf-8", "replace").splitlines()
                return next((line for line in reversed(lines) if line.strip()), "")
        return ""

    def error(self) -> JsonObject | None:
        """The error that the ended run printed; None: it printed none, or was killed."""
        last_line = self.printed() or {}
        return last_line if last_line.get("kind") == "error" else None

    def forget(self) -> None:
        """Remove what its server knows it by."""
        for what in ("output", "lock", "said"):
            _beside(self.run, what).unlink(missing_ok=True)


def rest_of_card() -> float:
    """Share of a card that a server leaves to the runs of its jobs. Raises InputError for next to nothing."""
    rest = 1 - card_share(SERVING_SHARE)
    if rest < LEAST_REST:
        raise InputError(
            f"{CARD_SHARE}={os.environ[CARD_SHARE]}: runs of jobs get what the server leaves of the card: next "
            f"to nothing. Give at most {1 - LEAST_REST:g}, or 1 to a server without --jobs or with jobs on "
            "other machines."
        )
    return rest


class LocalLauncher:
    """Runs on this machine."""

    def __init__(self, *, offline: bool) -> None:
        self._offline = offline

    def start(self, run: Path, recipe: Path, environment: Mapping[str, str]) -> ChildProcess:
        """Train in a new run folder, or resume the run that is in it, with these variables set too."""
        words = ["train", "--recipe", str(recipe), "--out", str(run)]
        if (run / "run.json").exists():
            words = ["resume", str(run)]
        words += ["--json", *(["--offline"] if self._offline else [])]
        share = {} if CARD_SHARE in environment else {CARD_SHARE: f"{rest_of_card():.3g}"}
        return start_child(run, "tunesmith", words, {**share, **environment})

    def find(self, run: Path) -> ChildProcess | None:
        """The process that works on a run still; None: there is none."""
        return ChildProcess(run) if _holder(run) is not None else None


def start_child(
    run: Path, module: str, words: Sequence[str], environment: Mapping[str, str], *, room: int = 0, says: bool = False
) -> ChildProcess:
    """Start a module with its arguments, known by files next to `run`, and with `room` bytes of the
    disk for what it prints, so that a full disk is met before it works. `says`: what it says on
    stderr is kept too. Raises OSError."""
    lock = os.open(_beside(run, "lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)  # the id of an earlier child may belong to another process by now
        errors = _beside(run, "said") if says else Path(os.devnull)
        with open(_beside(run, "output"), "wb", 0, opener=_no_link) as out, open(errors, "wb", opener=_no_link) as err:
            out.write(b"\n" * room)
            out.seek(0)
            popen = subprocess.Popen(
                ["nice", "-n", str(NICE), *python_words(module), *words],
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                env={**for_child(), **environment}, start_new_session=True, pass_fds=(lock,),
            )  # fmt: skip
        os.pwrite(lock, str(popen.pid).encode(), 0)
    finally:
        os.close(lock)
    return ChildProcess(run, popen)


def _no_link(path: str, flags: int) -> int:
    """Open a file to write, and no link: those of exports are in run folders, which a stranger may have
    packed."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _beside(run: Path, what: str) -> Path:
    return run.parent / f".{run.name}.{what}"


def _holder(run: Path) -> int | None:
    """Process id of the child that holds the lock file of a run, 0 if its server was killed before that."""
    try:
        lock = os.open(_beside(run, "lock"), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(lock, 20, 0) or b"0")
    else:
        return None
    finally:
        os.close(lock)
