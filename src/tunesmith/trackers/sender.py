"""The process that sends a run's events to one tracker, and its parent's side, which waits no longer than promised.

    python -m tunesmith.trackers.sender NAME RUN [--offline]

follows the run in this folder until its parent closes the pipe or dies, sends the rest, and ends with exit code 0 if
everything is sent. With an empty RUN it finds out whether the tracker can be used; else its last line says why not.
events.jsonl is the queue: what fails is read and sent again. What a tracker holds already is found out from the tracker
itself whenever a run is opened in it, so a kill between sending and noting it down does not write a value twice.
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
from tunesmith.phrases import command
from tunesmith.runs.atomic import clean, storing
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.trackers.libraries import SETTINGS, TRACKERS, check, check_names
from tunesmith.trackers.run_reader import RunReader, artifacts_of

PAUSE_S, MOST_STEPS = 5.0, 20
"""Shortest time between two batches, and steps that a tracker gets at once: each call is a request or a transaction."""
RETRY_S, LONGEST_WAIT_S = 1.0, 60.0
"""Shortest and longest pause before a tracker that failed is tried again."""
TRIES = 3
"""Attempts in a row that send nothing, before what is left is given up."""
READY_S = 60.0
"""Longest wait for a tracker to say that it can be used."""
LAST_S = 30.0
"""Longest wait for the rest to be sent once a run has ended."""


def read_state(run: Run, name: str) -> dict[str, Any]:
    """What tracking/NAME.json records: {"place", "step", "done", "error"}."""
    state = {"place": "", "step": -1, "done": False, "error": ""}
    with suppress(RunError):
        state |= run.read_json(f"tracking/{name}.json")
    return state


def send(run: Run, name: str, over: threading.Event) -> None:
    """Send a run to a tracker until the run is over, again after errors.

    Raises what the tracker raised in the last of `TRIES` attempts that sent nothing.
    """
    state, failures = read_state(run, name), 0

    def keep(**values: Any) -> None:
        state.update(values)
        run.write_json(f"tracking/{name}.json", state)

    while not state["done"]:
        before = state["step"]
        try:
            return _attempt(run, name, over, keep)
        except Exception as error:  # any library, any network: events.jsonl keeps what was not sent
            keep(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            failures = 1 if state["step"] > before else failures + 1
            if over.is_set() and failures >= TRIES:
                raise
        time.sleep(RETRY_S)
        over.wait(min(LONGEST_WAIT_S, 2.0**failures))


def _attempt(run: Run, name: str, over: threading.Event, keep: Callable[..., None]) -> None:
    """Send steps in batches from the first event on, without those that the tracker has. Raises whatever it raises."""
    reader, tail, is_last = RunReader(run), Tail(run.events_path), False
    tracker: Any = None
    try:
        while not is_last:
            is_last = over.is_set()
            steps = [step for event in tail.read() for step in reader.add(event)]
            if tracker is None and (steps or is_last):
                tracker = TRACKERS[name](run, reader)
                keep(place=tracker.place, step=tracker.last_step, error="")
            new = [step for step in steps if step.step > tracker.last_step] if tracker is not None else []
            for at in range(0, len(new), MOST_STEPS):
                tracker.log(new[at : at + MOST_STEPS])
                keep(step=new[at : at + MOST_STEPS][-1].step)
            if not is_last:
                over.wait(PAUSE_S)
        tracker.describe(reader)
        for path in artifacts_of(run) if reader.state == "end" else ():
            tracker.keep(path, f"{reader.key}-{path.name}", "model" if path.is_dir() else "report")
        tracker.close(reader.state)
        keep(done=reader.state == "end")
    except Exception:
        with suppress(Exception):  # it has failed already
            tracker.close()
        raise


def main() -> None:
    """Run the process."""
    name, place, offline = sys.argv[1], sys.argv[2], "--offline" in sys.argv
    if hasattr(os, "nice"):
        os.nice(10)  # training comes first
    os.environ |= {**SETTINGS, **os.environ, **({"WANDB_MODE": "offline"} if offline else {})}
    try:
        if place:
            _follow(Run(Path(place)), name)
        else:
            check(name, offline=offline)
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write(f"{error}\n")
        os._exit(1)
    os._exit(0)  # at once, whatever threads a library left running


def _follow(run: Run, name: str) -> None:
    folder, over = run.path / "tracking", threading.Event()

    def wait_for_parent() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait_for_parent, daemon=True).start()
    with storing(folder):
        folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / f"{name}.lock"):  # of an earlier process that still sends the rest
        clean(folder, name=f"{name}.json")
        send(run, name, over)


def start(name: str, run: Run | None, *, offline: bool) -> subprocess.Popen[str]:
    """The process; without a run it only finds out whether the tracker can be used."""
    words = [name, "" if run is None else str(run.path.absolute()), *(["--offline"] if offline else [])]
    is_silent = run is not None and os.environ.get("TUNESMITH_DEBUG") != "1"
    return subprocess.Popen(
        [sys.executable, "-m", "tunesmith.trackers.sender", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL if is_silent else subprocess.PIPE if run is None else None,
        text=True,
        env=for_child(),
        start_new_session=True,  # Ctrl-C is for the run
    )


def refuse_unusable(name: str, *, offline: bool) -> None:
    """Raise InputError if a tracker cannot be used."""
    with start(name, None, offline=offline) as process:
        try:
            said = process.communicate(timeout=READY_S)[1]
        except subprocess.TimeoutExpired:
            way = f"Leave it out, and send the run later: {command('track', 'RUN', '--to', name)}"
            raise InputError(f"track: {name}: no answer for {READY_S:.0f} s. {way}") from None
        finally:
            process.kill()
    if process.returncode:
        raise InputError(said.strip().rpartition("\n")[2] or f"track: {name}: its process ended.")


def finish(process: subprocess.Popen[str], run: Run, name: str, wait_s: float | None) -> tuple[bool, str]:
    """Let a process send the rest, for `wait_s` seconds or as long as it takes; whether all is sent, and a line."""
    assert process.stdin is not None
    process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(wait_s)
    process.kill()
    state, code = read_state(run, name), process.wait()
    step = f"up to step {state['step']:,}" if state["step"] >= 0 else "nothing yet"
    if code == 0:
        return True, f"{name}: sent {step}{', with the results' * state['done']}: {state['place']}"
    why = state["error"] or "no answer" + (f" within {wait_s:.0f} s" if wait_s is not None else "")
    way = command("track", run.path, "--to", name)
    return False, f"{name}: sent {step}; not all of it: {why}. Send the rest with: {way}"


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
    processes: dict[str, tuple[subprocess.Popen[str], Run]] = {}
    for name in chosen:
        say(True, f"opening {TRACKERS[name].title}")
        refuse_unusable(name, offline=offline)
    try:
        yield lambda run: processes.update((name, (start(name, run, offline=offline), run)) for name in chosen)
    except KeyboardInterrupt:
        wait_s = LAST_S
        raise
    finally:
        until = time.monotonic() + (wait_s or 0)
        for process, _ in processes.values():
            assert process.stdin is not None
            process.stdin.close()
        for name, (process, run) in processes.items():
            limit = "" if wait_s is None else f", for at most {wait_s:.0f} s"
            say(True, f"sending the rest to {TRACKERS[name].title}{limit}")
            say(*finish(process, run, name, None if wait_s is None else max(0.1, until - time.monotonic())))


if __name__ == "__main__":
    main()
