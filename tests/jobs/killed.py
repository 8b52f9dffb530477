"""What `test_kills` kills: a server of jobs with its dispatcher, runs that write a folder in half a second, an engine.

`python -m jobs.killed serve FOLDER PORT` is the server; its own launcher starts this file in place of tunesmith.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path

from tunesmith.runs import events
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Event

STEPS = 4
PARALLEL = 3
ENGINE = "import sys, time\nfor line in sys.stdin: time.sleep(0.1); print('served', line, end='', flush=True)"


def note(path: Path, line: str) -> None:
    """Add a line in one write, which no kill cuts."""
    file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)
    os.write(file, f"{line}\n".encode())
    os.close(file)


def run_job(words: list[str]) -> None:
    """In place of `tunesmith train` and `resume`: a step and its checkpoint each 50 ms."""
    path = Path(words[words.index("--out") + 1] if words[0] == "train" else words[1])
    alone = os.open(path.parent / f".{path.name}.alone", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(path.parents[2] / "log", f"{path.name} twice")
        sys.exit(1)
    note(path.parents[2] / "log", f"{path.name} started")
    if words[0] == "train":
        recipe = json.loads(Path(words[words.index("--recipe") + 1]).read_text())
        recipe["train"] = {"epochs": 1.0, "rows_per_step": 3}
        Run.create(path.parent, "x", json.dumps(recipe), out=path)
    run = Run(path)
    with run.lock():
        done = [event for event in run.events() if event.kind in ("checkpoint", "plan")]
        if not done:
            choices = [{"key": "optim.lr", "value": 0.1, "reason": "usual"}]
            run.append(Event("plan", 0, time.time(), {"steps": STEPS, "choices": choices}, {}))
        events.truncate_after(run.events_path, done[-1].step if done else 0)
        for step in range(done[-1].step + 1 if done else 1, STEPS + 1):
            if run.stop_asked():
                print(json.dumps({"kind": "error", "code": "Stopped", "message": "stopped"}), flush=True)
                sys.exit(1)
            time.sleep(0.05)
            run.append(Event("step", step, time.time(), {"loss": 1.0 / step, "tokens": 10}, {}))
            run.append(Event("checkpoint", step, time.time(), {}, {}))
        note(path.parents[2] / "log", f"{path.name} done")
        run.append(Event("end", STEPS, time.time(), {"report": ""}, {}))


class EngineProcess:
    """Says that it serves what it gets; killed, it is started again, and is not there until then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        pipe = subprocess.PIPE
        self.popen = subprocess.Popen([sys.executable, "-c", ENGINE], stdin=pipe, stdout=pipe, text=True)
        (self.folder / "engine").write_text(str(self.popen.pid))

    def attach(self, base: str, name: str, run: Path) -> None:
        (self.folder / "put on").write_text(name)
        try:
            assert self.popen.stdin is not None
            assert self.popen.stdout is not None
            self.popen.stdin.write(f"{name}\n")
            self.popen.stdin.flush()
            answer = self.popen.stdout.readline()
        except OSError:
            answer = ""
        (self.folder / "put on").unlink()
        if answer != f"served {name}\n":
            self.popen.wait()
            self.start()
            raise RequestError("the engine ended", status=500, code="engine_crashed")

    def detach(self, name: str) -> None:
        """Nobody asks it."""


def serve(folder: Path, port: int) -> None:
    from jobs import served
    from jobs.places import BASES
    from serve import running
    from tunesmith.jobs import launcher
    from tunesmith.jobs.dispatcher import Dispatcher
    from tunesmith.jobs.rules import ProjectRules, Rules
    from tunesmith.serve.http import bind

    launcher.python_words = lambda module: [str(folder / "run"), "-m", module]
    running.bind = lambda host, any_port: bind(host, port)  # type: ignore[attr-defined]
    with served.serving(folder) as it:
        it.store.rules = Rules(every_project=ProjectRules(jobs_waiting=10_000))
        starts = launcher.LocalLauncher(offline=True)
        working = Dispatcher(it.store, BASES, starts, EngineProcess(folder), print, PARALLEL)
        working.recover()
        working.run(threading.Event())


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]), int(sys.argv[3]))
    elif "tunesmith" in sys.argv:
        run_job(sys.argv[sys.argv.index("tunesmith") + 1 :])
    else:  # a check of files
        time.sleep(0.2)
        sys.argv = sys.argv[2:]
        runpy.run_module(sys.argv[0], run_name="__main__")
