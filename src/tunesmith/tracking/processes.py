"""Starts a sender for each tracker of a run, and waits for it at the end no longer than promised."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from tunesmith.environment import for_child
from tunesmith.errors import InputError
from tunesmith.formatting import command, size
from tunesmith.runs.folder import Run
from tunesmith.tracking.sender import read_state
from tunesmith.tracking.tracker import TRACKERS, check_names

READY_S = 60.0
"""Longest wait for a tracker to say that it can be used."""
LAST_S = 30.0
"""Longest wait for the rest to be sent once a run has ended."""


class SenderProcess:
    """A process that sends a run to one tracker."""

    def __init__(self, name: str, *, offline: bool) -> None:
        self.name = name
        self.run: Run | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.tracking.sender", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("TUNESMITH_DEBUG") == "1" else subprocess.DEVNULL,
            text=True,
            env=for_child(),
            start_new_session=True,  # Ctrl-C is for the run
        )
        self._answers: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._write({"offline": offline})

    def wait_ready(self) -> None:
        """Wait until the tracker can be used. Raises InputError if it cannot."""
        answer = self._answer(READY_S)
        if not answer.get("ready"):
            self.kill()
            late = f"track: {self.name}: no answer for {READY_S:.0f} s. Leave it out, and send the run later:"
            raise InputError(answer.get("error") or f"{late} {self._way()}")

    def begin(self, run: Run) -> None:
        """Let it send a run's events from now on."""
        self.run = run
        self._write({"run": str(run.path.absolute())})

    def finish(self, wait_s: float | None) -> tuple[bool, str]:
        """Let it send the rest, for `wait_s` seconds or as long as it takes; return whether all is sent, and a line."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        if self.run is None:
            self.kill()
            return True, ""
        answer = self._answer(wait_s)
        state = answer or read_state(self.run, self.name)
        self.kill()
        step = f"up to step {state['step']:,}" if state.get("step", -1) >= 0 else "nothing yet"
        if answer.get("sent"):
            with_files = f", report and adapter, {size(state['bytes'])}" if state.get("bytes") else ""
            return True, f"{self.name}: sent {step}{with_files}: {state['place']}"
        in_time = "" if wait_s is None else f" within {wait_s:.0f} s"
        why = state.get("error") or f"no answer{in_time}"
        return False, f"{self.name}: sent {step}; not all of it: {why}. Send the rest with: {self._way()}"

    def kill(self) -> None:
        """End the process, whatever it does."""
        with suppress(OSError):
            self._process.kill()
        self._process.wait()

    def _way(self) -> str:
        run = self.run.path if self.run else "RUN"
        return command("track", run, "--to", self.name)

    def _write(self, value: dict[str, Any]) -> None:
        with suppress(OSError):  # it has ended: its answer, or the lack of one, says so
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(value) + "\n")
            self._process.stdin.flush()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({})

    def _answer(self, wait_s: float | None) -> dict[str, Any]:
        with suppress(queue.Empty):
            return self._answers.get(timeout=wait_s)
        return {}


@contextmanager
def tracked(
    names: Sequence[str], *, offline: bool, say: Callable[[bool, str], None], wait_s: float = LAST_S
) -> Iterator[Callable[[Run], None]]:
    """A block in which a run is sent to trackers: it calls what is yielded with the run once its folder exists.

    Trackers cannot stop or slow the run. At the end the block waits `wait_s` in all for what is left; `say` gets
    whether all was sent, and a line, for each tracker. Raises InputError, before the block, if one cannot be used.
    """
    chosen = check_names(names)
    titles = ", ".join(TRACKERS[name].title for name in chosen)
    processes = [SenderProcess(name, offline=offline) for name in chosen]
    try:
        if processes:
            say(True, f"opening {titles}")
        for process in processes:
            process.wait_ready()

        def begin(run: Run) -> None:
            for process in processes:
                process.begin(run)

        yield begin
    finally:
        until = time.monotonic() + wait_s
        if any(process.run for process in processes):
            say(True, f"sending the rest to {titles}, for at most {wait_s:.0f} s")
        for process in processes:
            is_sent, line = process.finish(max(0.1, until - time.monotonic()))
            if line:
                say(is_sent, line)
