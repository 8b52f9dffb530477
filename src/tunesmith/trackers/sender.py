"""The process that sends a run's events to one tracker, and its parent's side, which waits as promised.

    python -m tunesmith.trackers.sender NAME [--offline]

answers in a line why the tracker cannot be used; an empty one means that it can. Then it waits for a line with
the folder of a run, follows the run until its parent closes the pipe or dies, sends the rest, and ends with
exit code 0 if everything is sent. events.jsonl is the queue: what fails is read and sent again. What a tracker
holds already is found out from the tracker itself whenever a run is opened in it, so a kill between sending and
noting it down does not write a value twice.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import filelock

from tunesmith.environment.children import for_child, python_words
from tunesmith.errors import InputError, RunError
from tunesmith.phrases import command
from tunesmith.runs.atomic import clean
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.trackers.libraries import SETTINGS, TRACKERS, Tracker, check_names, line_of, problem_of
from tunesmith.trackers.run_reader import RunReader, results_of
from tunesmith.types import JsonObject

PAUSE_S, MOST_STEPS = 5.0, 100
"""Shortest time between batches, and steps that a tracker gets at once: a call is a request or transaction."""
RETRY_S, LONGEST_WAIT_S = 1.0, 60.0
"""Shortest and longest pause before a tracker that failed is tried again."""
TRIES = 3
"""Attempts in a row that send nothing, before what is left is given up."""
READY_S = 60.0
"""Longest wait for a tracker to say that it can be used."""
LAST_S = 30.0
"""Longest wait for the rest to be sent once a run has ended."""
Say = Callable[[bool, str], None]


def read_state(run: Run, name: str) -> JsonObject:
    """Read tracking/NAME.json: {"where", "place", "step", "done", "error"}."""
    state = {"where": [], "place": "", "step": -1, "done": False, "error": ""}
    with suppress(RunError):
        state |= run.read_json(f"tracking/{name}.json")
    return state


def send(run: Run, name: str, tracker: Tracker, over: threading.Event) -> None:
    """Send a run to a tracker until the run is over, again after errors.

    Raises what the tracker raised in the last of `TRIES` attempts that sent nothing.
    """
    folder, failures = run.path / "tracking", 0
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / f"{name}.lock"):  # of an earlier process that still sends the rest
        clean(folder, name=f"{name}.json")
        here = list(tracker.where)
        if read_state(run, name)["where"] not in ([], here):
            _note(run, name, place="", step=-1, done=False)  # of another place
        while (before := read_state(run, name))["where"] != here or not before["done"]:
            try:
                return _attempt(run, name, tracker, over)
            except Exception as error:  # any library, any network: events.jsonl keeps what was not sent
                state = _note(run, name, error=f"{type(error).__name__}: {line_of(error)[:300]}")
                failures = 1 if state["step"] > before["step"] else failures + 1
                if over.is_set() and failures >= TRIES:
                    raise
            time.sleep(RETRY_S)
            over.wait(min(LONGEST_WAIT_S, 2.0**failures))


def _note(run: Run, name: str, **values: Any) -> JsonObject:
    state = read_state(run, name) | values
    run.write_json(f"tracking/{name}.json", state)
    return state


def _attempt(run: Run, name: str, tracker: Tracker, over: threading.Event) -> None:
    """Send steps in batches from the first event on, without those that the tracker has. Raises its errors."""
    reader, tail, is_open, is_last = RunReader(run), Tail(run.events_path), False, False
    try:
        while not is_last:
            is_last = over.is_set()
            steps = [step for event in tail.read() for step in reader.add(event)]
            if not is_open and (steps or is_last):
                tracker.open(run, reader)
                _note(run, name, where=tracker.where, place=tracker.place, step=tracker.last_step, error="")
                is_open = True
            new = [step for step in steps if step.step > tracker.last_step]
            for at in range(0, len(new), MOST_STEPS):
                tracker.log(new[at : at + MOST_STEPS])
                _note(run, name, step=new[at : at + MOST_STEPS][-1].step)
            if not is_last:
                over.wait(PAUSE_S)
        tracker.describe(reader, results_of(run) if reader.state == "end" else [])
        tracker.close(reader.state)
        _note(run, name, done=reader.state == "end")
    except Exception:
        with suppress(Exception):  # it has failed already
            tracker.close()
        raise


def main() -> None:
    """Run the process."""
    name, offline, over, out = sys.argv[1], "--offline" in sys.argv, threading.Event(), os.dup(1)
    os.dup2(2, 1)  # for what a library prints

    def answer(text: str) -> None:
        with suppress(OSError):  # the parent died
            os.write(out, f"{text}\n".encode())

    def wait_for_parent() -> None:
        sys.stdin.read()
        over.set()

    if hasattr(os, "nice"):
        os.nice(10)  # training comes first
    os.environ |= {**SETTINGS, **os.environ, **({"WANDB_MODE": "offline"} if offline else {})}
    way = f"Leave it out, and send the run later: {command('track', 'RUN', '--to', name)}"
    late = threading.Timer(READY_S, answer, [f"track: {name}: no answer for {READY_S:.0f} s. {way}"])
    late.start()
    try:
        tracker = TRACKERS[name](offline)
        late.cancel()
        answer("")
        if place := sys.stdin.readline():
            threading.Thread(target=wait_for_parent, daemon=True).start()
            send(Run(Path(json.loads(place))), name, tracker, over)
    except BaseException as error:  # a library may exit too
        traceback.print_exc()
        answer(problem_of(name, error))
        os._exit(1)
    os._exit(0)  # at once, whatever threads a library left running


@contextmanager
def tracked(
    names: Sequence[str], *, offline: bool, say: Say, wait_s: float | None = LAST_S, optional: Sequence[str] = ()
) -> Iterator[Callable[[Run], None]]:
    """A block in which a run is sent to trackers: it calls what is yielded with the run once its folder exists.

    Trackers cannot stop or slow the run. At the end the block waits `wait_s` in all for what is left, or as
    long as it takes; `say` gets whether all was sent, and a line, for each tracker. Raises InputError, before
    the block, if one cannot be used. `optional` trackers, which a resumed recipe names, are reported instead,
    and the run continues.
    """
    processes = {
        name: subprocess.Popen(
            [*python_words("tunesmith.trackers.sender"), name, *(["--offline"] if offline else [])],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("TUNESMITH_DEBUG") == "1" else subprocess.DEVNULL,
            env=for_child(),
            start_new_session=True,  # Ctrl-C is for the run
        )
        for name in [*check_names(names), *_usable([] if "none" in names else optional, names, say)]
    }
    runs: list[Run] = []

    def begin(run: Run) -> None:
        runs.append(run)
        for process in processes.values():
            with suppress(OSError):  # it died
                cast(IO[bytes], process.stdin).write(json.dumps(str(run.path.absolute())).encode() + b"\n")

    try:
        for name, process in list(processes.items()):
            say(True, f"opening {name}")
            first_line = cast(IO[bytes], process.stdout).readline().decode()
            if first_line != "\n":
                problem = first_line.strip() or f"track: {name}: its process ended."
                if name in names:
                    raise InputError(problem)
                say(False, _without(name, problem))
                with processes.pop(name):
                    process.kill()
        yield begin
    except KeyboardInterrupt:
        wait_s = LAST_S
        raise
    finally:
        until = None if wait_s is None else time.monotonic() + wait_s
        for process in processes.values():
            cast(IO[bytes], process.stdin).close()
        for name, process in processes.items() if runs else ():
            say(True, f"sending the rest to {name}" + ("" if wait_s is None else f", for at most {wait_s:.0f} s"))
            say(*_result(runs[0], name, process, until))
        for process in processes.values():
            with process:
                process.kill()


def _usable(optional: Sequence[str], others: Sequence[str], say: Say) -> list[str]:
    """The optional trackers, without the others, whose packages are here; the rest is named as missing."""
    usable = []
    for name in dict.fromkeys(optional):
        if name not in others:
            try:
                usable += check_names([name])
            except InputError as error:
                say(False, _without(name, str(error)))
    return usable


def _without(name: str, problem: str) -> str:
    return f"{problem} The run continues without it; send it later: {command('track', 'RUN', '--to', name)}"


def _result(run: Run, name: str, process: subprocess.Popen[bytes], until: float | None) -> tuple[bool, str]:
    """Wait for a process to send the rest; whether all is sent, and a line."""
    is_sent, why = False, "no answer in time"
    with suppress(subprocess.TimeoutExpired):
        is_sent = process.wait(None if until is None else max(0.1, until - time.monotonic())) == 0
        why = "its process ended"
    state = read_state(run, name)
    step = f"up to step {state['step']:,}" if state["step"] >= 0 else "nothing yet"
    if is_sent:
        sent = "written" if (is_folder := Path(state["place"]).is_dir()) else "sent"
        can_sync = is_folder and name == "wandb"
        way = f". Send it with: wandb sync {shlex.quote(state['place'])}" if can_sync else ""
        return True, f"{name}: {sent} {step}{', with the results' * state['done']}: {state['place']}{way}"
    way = command("track", run.path, "--to", name)
    return False, f"{name}: sent {step}; not all of it: {state['error'] or why}. Send the rest with: {way}"


if __name__ == "__main__":
    main()
