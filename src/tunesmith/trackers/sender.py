"""The process that sends a run's events to one tracker, and its parent's side, which waits no longer than promised.

    python -m tunesmith.trackers.sender NAME

reads one line of JSON from its parent, {"run", "offline"}, and works until the parent closes the pipe or dies. It
writes one line once the tracker can be used, and one when everything is sent. events.jsonl is the queue: what fails is
read and sent again. What a tracker holds already is found out from the tracker itself whenever a run is opened in it,
so a kill between sending and noting it down does not write a value twice.
"""

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
from pathlib import Path
from typing import Any

import filelock

from tunesmith.environment import for_child
from tunesmith.errors import InputError
from tunesmith.phrases import command, size
from tunesmith.runs import events
from tunesmith.runs.atomic import clean, from_json, storing, to_json, write_atomic
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import (
    QUIET,
    TRACKERS,
    RunReader,
    StepMetrics,
    Tracker,
    artifacts_of,
    check_names,
    num_bytes,
)

POLL_S = 1.0
PAUSE_S = 5.0
"""Shortest time between two batches: each is a request or a transaction, whatever it holds."""
LONGEST_WAIT_S = 60.0
"""Longest pause before a tracker that failed is tried again."""
ORPHAN_S = 120.0
"""Time that is left to send the rest once the parent is gone."""
TRIES = 3
"""Attempts in a row that send nothing, before what is left is given up."""
READY_S = 60.0
"""Longest wait for a tracker to say that it can be used."""
LAST_S = 30.0
"""Longest wait for the rest to be sent once a run has ended."""


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
    """One attempt to send a run's steps to a tracker, in batches, from the first event on: what the tracker has of them
    is not sent again."""

    def __init__(self, run: Run, name: str, is_over: Callable[[], bool]) -> None:
        self.run, self.name, self.is_over = run, name, is_over
        self.reader = RunReader(run)
        self.state: dict[str, Any] = {"place": "", "step": -1, "kept": -1, "done": False, **read_state(run, name)}
        self.num_sent = 0
        self._next_batch_at = 0.0
        self._tracker: Tracker | None = None
        self._coming: queue.Queue[list[StepMetrics] | Exception | None] = queue.Queue()
        self._is_closed = False

    def send(self) -> None:
        """Send everything until the run is over. Raises whatever the tracker raises."""
        threading.Thread(target=self._read, daemon=True).start()
        is_read = False
        while not is_read:
            steps, is_read = self._collect()
            if steps or is_read:
                self._send(steps)
        assert self._tracker is not None
        is_done = self.reader.state == "end"
        artifacts = artifacts_of(self.run) if is_done else {}
        self._tracker.finish(self.reader, artifacts)
        self._save(kept=self.state["step"], done=is_done, bytes=num_bytes(artifacts))

    def abandon(self, error: Exception) -> None:
        """Close what is open, and note the error down."""
        self._is_closed = True
        with suppress(Exception):  # it has failed already
            if self._tracker is not None:
                self._tracker.close()
        self._save(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _read(self) -> None:
        """Read events in a thread, so that a slow tracker gets them in batches."""
        try:
            for event in events.follow(self.run.events_path, lambda: self._is_closed or self.is_over(), poll_s=POLL_S):
                if steps := self.reader.add(event):
                    self._coming.put(steps)
            self._coming.put(self.reader.rest())
            self._coming.put(None)
        except Exception as error:  # a damaged log: raised by the thread that sends
            self._coming.put(error)

    def _collect(self) -> tuple[list[StepMetrics], bool]:
        """Wait for steps and take all there are; also return whether no more will come."""
        steps: list[StepMetrics] = []
        while time.monotonic() < self._next_batch_at and not self.is_over():
            time.sleep(POLL_S)
        with suppress(queue.Empty):
            item = self._coming.get(timeout=POLL_S)
            while item is not None:
                if isinstance(item, Exception):
                    raise item
                steps += item
                item = self._coming.get_nowait()
            return steps, True
        return steps, False

    def _send(self, steps: list[StepMetrics]) -> None:
        if self._tracker is None:
            open_run = TRACKERS[self.name].load().open_run
            self._tracker = open_run(self.run, self.reader, int(self.state["kept"]))
            self._save(place=self._tracker.place, step=self._tracker.last_step, error="")
        new: list[StepMetrics] = []
        for step in steps:  # a resumed run repeats steps
            if step.step > (new[-1].step if new else self.state["step"]):
                new.append(step)
        if new:
            self._tracker.log(new)
            self.num_sent += len(new)
            self._next_batch_at = time.monotonic() + PAUSE_S
            self._save(step=new[-1].step)

    def _save(self, **values: Any) -> None:
        self.state |= values
        write_atomic(state_path(self.run, self.name), to_json(self.state, indent=True) + b"\n")


def send(run: Run, name: str, is_over: Callable[[], bool]) -> dict[str, Any]:
    """Send a run to a tracker until the run is over, again after errors; return the final state.

    Raises what the tracker raised in the last of `TRIES` attempts that sent nothing.
    """
    failures = 0
    while True:
        sender = Sender(run, name, is_over)
        try:
            sender.send()
            return sender.state
        except Exception as error:  # any library, any network: events.jsonl keeps what was not sent
            sender.abandon(error)
            failures = 1 if sender.num_sent else failures + 1
            if is_over() and failures >= TRIES:
                raise
        time.sleep(POLL_S)
        until = time.monotonic() + min(LONGEST_WAIT_S, 2.0**failures)
        while time.monotonic() < until and not is_over():
            time.sleep(POLL_S)


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
        try:
            answer(sent=True, **send(run, name, over.is_set))
        except Exception:
            answer(**read_state(run, name))


def _wait_for_end(over: threading.Event) -> None:
    parent, orphaned = os.getppid(), 0.0
    sys.stdin.read()
    over.set()
    while orphaned < ORPHAN_S:
        time.sleep(POLL_S)
        orphaned += POLL_S if os.getppid() != parent else 0.0
    os._exit(1)


class SenderProcess:
    """A process that sends a run to one tracker."""

    def __init__(self, name: str, *, offline: bool) -> None:
        self.name = name
        self.run: Run | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.trackers.sender", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("TUNESMITH_DEBUG") == "1" else subprocess.DEVNULL,
            text=True,
            env=for_child(),
            start_new_session=True,  # Ctrl-C is for the run
        )
        self.pid = self._process.pid
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
            names = "report and adapter" if self.run.adapter_path.exists() else "report"
            with_files = f", {names}, {size(state['bytes'])}" if state.get("bytes") else ""
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


if __name__ == "__main__":
    main()
