"""The process that sends a run's events to one tracker, and its parent's side, which waits no longer than promised.

    python -m tunesmith.trackers.sender NAME

writes one line: empty once the tracker can be used, else why it cannot. Then it reads the run's folder from its parent,
follows the run until the parent closes the pipe or dies, and ends with exit code 0 if everything is sent. events.jsonl
is the queue: what fails is read and sent again. What a tracker holds already is found out from the tracker itself
whenever a run is opened in it, so a kill between sending and noting it down does not write a value twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from tunesmith.environment import for_child
from tunesmith.errors import InputError, RunError
from tunesmith.phrases import command, size
from tunesmith.runs.atomic import clean, storing
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.trackers.tracker import QUIET, TRACKERS, RunReader, StepMetrics, Tracker, artifacts_of, check_names, load

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
    with suppress(RunError):
        return dict(run.read_json(f"tracking/{name}.json"))
    return {}


class Sender:
    """One attempt to send a run's steps to a tracker, in batches, from the first event on: what the tracker has of them
    is not sent again."""

    def __init__(self, run: Run, name: str, is_over: Callable[[], bool]) -> None:
        self.run, self.name, self.is_over = run, name, is_over
        self.reader = RunReader(run)
        self.state: dict[str, Any] = {"place": "", "step": -1, "kept": -1, "done": False, **read_state(run, name)}
        self.num_sent = 0
        self._tracker: Tracker | None = None

    def send(self) -> None:
        """Send everything until the run is over. Raises whatever the tracker raises."""
        tail, is_last = Tail(self.run.events_path), False
        while not is_last:
            is_last = self.is_over()
            steps = [step for event in tail.read() for step in self.reader.add(event)]
            steps += self.reader.rest() if is_last else []
            if steps or is_last:
                self._send(steps)
            if not is_last:
                _pause(PAUSE_S, self.is_over)
        assert self._tracker is not None
        is_done = self.reader.state == "end"
        artifacts, num_bytes = artifacts_of(self.run) if is_done else ({}, 0)
        self._tracker.finish(self.reader, artifacts)
        self._save(kept=self.state["step"], done=is_done, bytes=num_bytes)

    def abandon(self, error: Exception) -> None:
        """Close what is open, and note the error down."""
        with suppress(Exception):  # it has failed already
            if self._tracker is not None:
                self._tracker.close()
        self._save(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _send(self, steps: Sequence[StepMetrics]) -> None:
        if self._tracker is None:
            self._tracker = load(self.name).open_run(self.run, self.reader)
            place = self._tracker.place
            self._save(place=place, step=self._tracker.last_step, error="")
        new: list[StepMetrics] = []
        for step in steps:  # a resumed run repeats steps
            if step.step > (new[-1].step if new else self.state["step"]):
                new.append(step)
        if new:
            self._tracker.log(new)
            self.num_sent += len(new)
            self._save(step=new[-1].step)

    def _save(self, **values: Any) -> None:
        self.state |= values
        self.run.write_json(f"tracking/{self.name}.json", self.state)


def _pause(seconds: float, is_over: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not is_over():
        time.sleep(POLL_S)


def send(run: Run, name: str, is_over: Callable[[], bool]) -> None:
    """Send a run to a tracker until the run is over, again after errors.

    Raises what the tracker raised in the last of `TRIES` attempts that sent nothing.
    """
    failures = 0
    while True:
        sender = Sender(run, name, is_over)
        try:
            return sender.send()
        except Exception as error:  # any library, any network: events.jsonl keeps what was not sent
            sender.abandon(error)
            failures = 1 if sender.num_sent else failures + 1
            if is_over() and failures >= TRIES:
                raise
        time.sleep(POLL_S)
        _pause(min(LONGEST_WAIT_S, 2.0**failures), is_over)


def main() -> None:
    """Run the process."""
    name, offline = sys.argv[1], "--offline" in sys.argv
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print what they like
    if hasattr(os, "nice"):
        os.nice(10)  # training comes first
    os.environ |= QUIET
    try:
        load(name).check(offline)
        refusal = ""
    except Exception as error:  # a broken installation raises anything
        refusal = str(error) if isinstance(error, InputError) else f"{name}: {type(error).__name__}: {error}"
    with suppress(BrokenPipeError):
        answers.write(f"{' '.join(refusal.split())}\n")
        answers.flush()
    place = sys.stdin.readline()
    if refusal or not place:
        return
    run, over = Run(Path(place.rstrip("\n"))), threading.Event()
    threading.Thread(target=_wait_for_parent, args=(over,), daemon=True).start()
    folder = state_path(run, name).parent
    with storing(folder):
        folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / f"{name}.lock"):  # of an earlier process that still sends the rest
        clean(folder, name=f"{name}.json")
        try:
            send(run, name, over.is_set)
        except Exception:
            traceback.print_exc()  # read_state has it too
            os._exit(1)
    os._exit(0)  # at once, whatever threads a library left running


def _wait_for_parent(over: threading.Event) -> None:
    parent = os.getppid()
    sys.stdin.read()
    over.set()
    while os.getppid() == parent:
        time.sleep(POLL_S)
    time.sleep(ORPHAN_S)
    os._exit(1)


class SenderProcess:
    """A process that sends a run to one tracker."""

    def __init__(self, name: str, *, offline: bool) -> None:
        self.name = name
        self.run: Run | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.trackers.sender", name, *(["--offline"] if offline else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("TUNESMITH_DEBUG") == "1" else subprocess.DEVNULL,
            text=True,
            env=for_child(),
            start_new_session=True,  # Ctrl-C is for the run
        )
        self.pid = self._process.pid

    def wait_ready(self) -> None:
        """Wait until the tracker can be used. Raises InputError if it cannot."""
        assert self._process.stdout is not None
        late = threading.Timer(READY_S, self._process.kill)
        late.start()
        try:
            answer = self._process.stdout.readline()
        finally:
            late.cancel()
        if answer != "\n":
            self.kill()
            no_answer = f"track: {self.name}: no answer for {READY_S:.0f} s. Leave it out, and send the run later:"
            raise InputError(answer.strip() or f"{no_answer} {command('track', 'RUN', '--to', self.name)}")

    def begin(self, run: Run) -> None:
        """Let it send a run's events from now on."""
        assert self._process.stdin is not None
        self.run = run
        with suppress(OSError):  # it has ended: its exit code says so
            self._process.stdin.write(f"{run.path.absolute()}\n")
            self._process.stdin.flush()

    def finish(self, wait_s: float | None) -> tuple[bool, str]:
        """Let it send the rest, for `wait_s` seconds or as long as it takes; return whether all is sent, and a line."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        if self.run is None:
            self.kill()
            return True, ""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        self.kill()
        state = read_state(self.run, self.name)
        step = f"up to step {state['step']:,}" if state.get("step", -1) >= 0 else "nothing yet"
        if self._process.returncode == 0:
            names = "report and adapter" if self.run.adapter_path.exists() else "report"
            with_files = f", {names}, {size(state['bytes'])}" if state.get("bytes") else ""
            return True, f"{self.name}: sent {step}{with_files}: {state['place']}"
        why = state.get("error") or ("no answer" if wait_s is None else f"no answer within {wait_s:.0f} s")
        way = command("track", self.run.path, "--to", self.name)
        return False, f"{self.name}: sent {step}; not all of it: {why}. Send the rest with: {way}"

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()


@contextmanager
def tracked(
    names: Sequence[str], *, offline: bool, say: Callable[[bool, str], None], wait_s: float | None = LAST_S
) -> Iterator[Callable[[Run], None]]:
    """A block in which a run is sent to trackers: it calls what is yielded with the run once its folder exists.

    Trackers cannot stop or slow the run. At the end the block waits `wait_s` in all for what is left, or as long as it
    takes; `say` gets whether all was sent, and a line, for each tracker. Raises InputError, before the block, if one
    cannot be used.
    """
    chosen = check_names(names)
    titles = ", ".join(TRACKERS[name] for name in chosen)
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
    except KeyboardInterrupt:
        wait_s = min(LAST_S, LAST_S if wait_s is None else wait_s)
        raise
    finally:
        until = None if wait_s is None else time.monotonic() + wait_s
        if any(process.run for process in processes):
            say(True, f"sending the rest to {titles}" + (f", for at most {wait_s:.0f} s" if wait_s else ""))
        for process in processes:
            is_sent, line = process.finish(None if until is None else max(0.1, until - time.monotonic()))
            if line:
                say(is_sent, line)


if __name__ == "__main__":
    main()
