"""The process that sends a run's events to one tracker: `python -m tunesmith.tracking.sender NAME`.

It reads one line of JSON from its parent, {"run", "offline"}, and works until the parent closes the pipe or dies. It
writes one line once the tracker can be used, and one when everything is sent. events.jsonl is the queue: what fails is
read and sent again. What a tracker holds already is found out from the tracker itself whenever a run is opened in it,
so a kill between sending and noting it down does not write a value twice.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock

from tunesmith.errors import InputError
from tunesmith.runs import events
from tunesmith.runs.atomic import clean, from_json, storing, to_json, write_atomic
from tunesmith.runs.folder import Run
from tunesmith.tracking.step_metrics import RunReader, StepMetrics
from tunesmith.tracking.tracker import QUIET, TRACKERS, Tracker, artifacts_of, num_bytes

POLL_S = 1.0
LONGEST_WAIT_S = 60.0
"""Longest pause before a tracker that failed is tried again."""
ORPHAN_S = 120.0
"""Time that is left to send the rest once the parent is gone."""
TRIES = 3
"""Attempts to send the rest."""


def state_path(run: Run, name: str) -> Path:
    """The file that records what a tracker has: {"place", "step", "kept", "done", "bytes", "error"}.

    `kept` is the newest step when the tracker last closed the run in peace.
    """
    return run.path / "tracking" / f"{name}.json"


def read_state(run: Run, name: str) -> dict[str, Any]:
    """The recorded state; empty if there is none."""
    with suppress(OSError, ValueError):
        return dict(from_json(state_path(run, name).read_bytes()))
    return {}


class Sender:
    """Sends the steps of one run to one tracker, in batches, and tries again after errors."""

    def __init__(self, run: Run, name: str, is_over: Callable[[], bool]) -> None:
        self.run, self.name, self.is_over = run, name, is_over
        self.reader = RunReader(run)
        self.state: dict[str, Any] = {"place": "", "step": -1, "kept": -1, "done": False, **read_state(run, name)}
        self._tracker: Tracker | None = None
        self._pending: list[StepMetrics] = []
        self._coming: queue.Queue[list[StepMetrics] | Exception | None] = queue.Queue()

    def send(self) -> None:
        """Send everything until the run is over. Raises what the tracker raised in the last attempt."""
        threading.Thread(target=self._read, daemon=True).start()
        is_read, failures = False, 0
        while True:
            is_read = self._collect() or is_read
            try:
                self._send_pending(is_last=is_read)
                if is_read:
                    self._finish()
                    return
                failures = 0
            except Exception as error:  # any library, any network: events.jsonl keeps what was not sent
                failures += 1
                self._abandon(error)
                if is_read and failures >= TRIES:
                    raise
                self._pause(failures)

    def _read(self) -> None:
        """Read events in a thread, so that a slow tracker gets them in batches."""
        try:
            for event in events.follow(self.run.events_path, self.is_over, poll_s=POLL_S):
                if steps := self.reader.add(event):
                    self._coming.put(steps)
            self._coming.put(self.reader.rest())
            self._coming.put(None)
        except Exception as error:  # a damaged log: raised where it ends the process with its message
            self._coming.put(error)

    def _collect(self) -> bool:
        """Wait for steps and take all there are; return whether no more will come."""
        with suppress(queue.Empty):
            item = self._coming.get(timeout=POLL_S)
            while True:
                if item is None:
                    return True
                if isinstance(item, Exception):
                    raise item
                self._pending += item
                item = self._coming.get_nowait()
        return False

    def _send_pending(self, *, is_last: bool) -> None:
        if not self._pending and not is_last:
            return
        tracker = self._tracker
        if tracker is None:
            tracker = TRACKERS[self.name].load().open_run(self.run, self.reader, int(self.state["kept"]))
            self._tracker = tracker
            self._save(place=tracker.place, step=tracker.last_step, error="")
        new: list[StepMetrics] = []
        for step in self._pending:  # a resumed run repeats steps
            if step.step > (new[-1].step if new else self.state["step"]):
                new.append(step)
        if new:
            tracker.log(new)
            self._save(step=new[-1].step)
        self._pending = []

    def _finish(self) -> None:
        assert self._tracker is not None
        is_done = self.reader.state == "end"
        artifacts = artifacts_of(self.run) if is_done else {}
        self._tracker.finish(self.reader, artifacts)
        self._save(kept=self.state["step"], done=is_done, bytes=num_bytes(artifacts))

    def _abandon(self, error: Exception) -> None:
        with suppress(Exception):  # it has failed already
            if self._tracker is not None:
                self._tracker.close()
        self._tracker = None
        self._save(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _pause(self, failures: int) -> None:
        until = time.monotonic() + min(LONGEST_WAIT_S, 2.0**failures)
        while time.monotonic() < until and not self.is_over():
            time.sleep(POLL_S)

    def _save(self, **values: Any) -> None:
        self.state |= values
        write_atomic(state_path(self.run, self.name), to_json(self.state, indent=True) + b"\n")


def main() -> None:
    """Run the process."""
    name = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print what they like

    def answer(**values: Any) -> None:
        with suppress(BrokenPipeError):
            answers.write(json.dumps(values) + "\n")
            answers.flush()

    if hasattr(os, "nice"):
        os.nice(10)  # training comes first
    os.environ |= QUIET
    request = json.loads(sys.stdin.readline() or "{}")
    try:
        TRACKERS[name].load().check(bool(request.get("offline")))
    except Exception as error:  # a broken installation raises anything
        text = str(error) if isinstance(error, InputError) else f"{name}: {type(error).__name__}: {error}"
        answer(error=text)
        return
    answer(ready=True)
    line = sys.stdin.readline()
    if not line:
        return
    run = Run(Path(json.loads(line)["run"]))
    over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(over,), daemon=True).start()
    folder = state_path(run, name).parent
    with storing(folder):
        folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / f"{name}.lock"):  # of an earlier process that still sends the rest
        clean(folder, name=f"{name}.json")
        sender = Sender(run, name, over.is_set)
        try:
            sender.send()
        except Exception as error:
            answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", **sender.state)
            return
    answer(sent=True, **sender.state)


def _wait_for_end(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()
    time.sleep(ORPHAN_S)
    os._exit(1)


if __name__ == "__main__":
    main()
