"""Something is killed each second: the server, a run, the engine. Every job succeeds once, and nothing is left over.

TUNESMITH_KILLED_JOBS=1000 for a long one.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the openai package is the client of these tests")

import fresh  # noqa: E402
from faults import tree  # noqa: E402
from jobs import killed  # noqa: E402
from jobs.places import FakeModels, put_file, rows  # noqa: E402
from serve.running import wait_for  # noqa: E402
from tiny_run import chats, model_folder  # noqa: E402
from tunesmith.jobs.bases import Bases, PublicBase  # noqa: E402
from tunesmith.jobs.dispatcher import Dispatcher  # noqa: E402
from tunesmith.jobs.job_request import JobBody  # noqa: E402
from tunesmith.jobs.launcher import ChildProcess, _holder  # noqa: E402
from tunesmith.jobs.routes import create_job  # noqa: E402
from tunesmith.jobs.states import ENDED  # noqa: E402
from tunesmith.jobs.store import Store  # noqa: E402
from tunesmith.jobs.tables import events, files, jobs  # noqa: E402
from tunesmith.runs.folder import Run  # noqa: E402

NUM_JOBS = int(os.environ.get("TUNESMITH_KILLED_JOBS", "200"))
PATHS = os.pathsep.join(str(Path(__file__).parents[depth] / name) for depth, name in ((1, ""), (2, "src")))
MOST_KILLS = 2
"""Of one run: the third without a checkpoint between would rightly be its job's error."""


class Target:
    """A server at a fixed port, which is started again when it is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        own = f'#!/bin/sh\nexec {sys.executable} {Path(killed.__file__)} "$@"\n'
        (folder / "run").write_text(own)
        (folder / "run").chmod(0o700)
        self.kills: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "jobs.killed", "serve", str(self.folder), str(self.port)]
        with open(self.folder / "output", "ab") as out:
            self.popen = subprocess.Popen(
                words, env={**os.environ, "PYTHONPATH": PATHS}, stdout=out, stderr=out, start_new_session=True
            )

    def running(self) -> list[tuple[str, int]]:
        """(job, process) of runs under way."""
        found = ((path.name[1:-5], _holder(path.with_name(path.name[1:-5]))) for path in self.runs.glob(".*.lock"))
        return [(name, process) for name, process in found if process]

    @property
    def runs(self) -> Path:
        return self.folder / "store" / "runs"

    def kill(self, draw: random.Random) -> None:
        """Kill one of the processes that are there."""
        under_way = [one for one in self.running() if self.kills[one[0]] < MOST_KILLS]
        checks = [one for one in under_way if one[0].endswith(".check")]
        runs = [one for one in under_way if one not in checks]
        what = draw.choice(["server", "engine", "put on", *["run"] * bool(runs), *["check"] * bool(checks)])
        with suppress(OSError, ValueError):
            if what == "put on":  # the engine, in the act
                with suppress(AssertionError):
                    wait_for((self.folder / "put on").exists, timeout_s=3)
            if what in ("put on", "engine"):
                with suppress(FileNotFoundError):
                    tuned = (self.folder / "put on").read_text()
                    self.kills[tuned] += 1
                    if self.kills[tuned] > MOST_KILLS:
                        return
                os.kill(int((self.folder / "engine").read_text()), signal.SIGKILL)
            elif what == "server":
                self.popen.kill()
                self.popen.wait()
                self.start()
            else:
                name, process = draw.choice(runs if what == "run" else checks)
                os.kill(process, signal.SIGKILL)
                self.kills[name] += 1
            self.kills[what] += 1


def create(target: Target, num: int, made: list[str]) -> None:
    """A client that creates jobs, and sends again what is not answered."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{target.port}/v1", api_key="none", max_retries=50)
    file = client.files.create(file=("rows.jsonl", rows(12)), purpose="fine-tune").id
    for seed in range(num):
        made.append(client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=seed).id)


@pytest.mark.slow
@pytest.mark.timeout(300 + 3 * NUM_JOBS)
def test_every_job_succeeds_once_while_something_is_killed_each_second(tmp_path: Path) -> None:
    target, draw, made = Target(tmp_path), random.Random(5), list[str]()
    store = tmp_path / "store" / "jobs.sqlite"
    wait_for(store.exists, timeout_s=30)
    client = threading.Thread(target=create, args=(target, NUM_JOBS, made), daemon=True)
    client.start()
    started = time.monotonic()
    log = tmp_path / "log"
    while (done := log.read_text().count(" done") if log.exists() else 0) < NUM_JOBS or client.is_alive():
        time.sleep(1)
        target.kill(draw)
        assert time.monotonic() - started < 60 + 3 * NUM_JOBS, f"{done} of {NUM_JOBS}"
    seconds = time.monotonic() - started
    ask: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{target.port}/v1", api_key="none", max_retries=50)
    wait_for(lambda: ask.fine_tuning.jobs.list(limit=1).data[0].finished_at is not None, timeout_s=60)
    wait_for(lambda: all(job.finished_at for job in ask.fine_tuning.jobs.list(limit=100)), timeout_s=60)
    assert not target.running()
    engine = int((tmp_path / "engine").read_text())
    target.popen.kill()
    target.popen.wait()
    wait_for(lambda: not Path(f"/proc/{engine}").exists(), timeout_s=10)
    check(tmp_path, made)
    text = ", ".join(f"{what} {target.kills[what]}" for what in ("server", "check", "run", "engine", "put on"))
    print(f"{NUM_JOBS} jobs in {seconds:.0f} s; killed: {text}")


def check(folder: Path, made: list[str]) -> None:
    """Each job succeeded, by one run at a time, with one model, one result and each of its events once."""
    assert "twice" not in (folder / "log").read_text()
    store = Store(folder / "store")
    rows = {row["id"]: row for row in store.page(jobs, limit=10 * NUM_JOBS)[0]}
    assert sorted(rows) == sorted(made), "a job that a client did not ask for, or asked for and did not get"
    assert Counter(row["status"] for row in rows.values()) == {"succeeded": NUM_JOBS}
    assert sorted(row["job"] for row in store.tuned()) == sorted(made)
    expected = ["Created", "Validating", "Files", "Fine-tuning", "Plan:", "Chosen:"]
    expected += ["Step"] * killed.STEPS + ["All", "Checkpoint", "New", "The"]
    for name in made:
        found = [row["message"] for row in store.page(events, events.c.job == name, limit=100)[0]]
        usual = [one for one in found if "again" not in one]
        assert sorted(one.split()[0] for one in usual) == sorted(expected), found
        assert sum(event.kind == "step" for event in Run(store.runs_path / name).events()) == killed.STEPS
    known = {row["id"] for row in store.page(files, limit=10 * NUM_JOBS)[0]}
    assert {path.name for path in store.files_path.iterdir()} == known
    assert {path.name for path in store.runs_path.iterdir() if path.name[0] != "."} == set(made)
    store.close()


# A run at each of its writes

RUN = """
import os, runpy, time
while not os.path.exists({go!r}):
    time.sleep(0.002)
runpy.run_module("tunesmith", run_name="__main__", alter_sys=True)
"""
WRITES = "write,pwrite64,fdatasync,fsync,rename,unlink,unlinkat,ftruncate,mkdir"
REAL = Bases(bases={"tiny": PublicBase(model="tiny", recipe={"checkpoint": {"every": 3}})})
CHOSEN = re.compile(r"(?<=^Chosen: ).*", re.DOTALL)
"""Its words may depend on what else the machine does."""
STRIDE = int(os.environ.get("TUNESMITH_KILL_STRIDE", "7"))
needs_strace = pytest.mark.skipif(shutil.which("strace") is None or sys.platform != "linux", reason="strace is missing")


def traced(process: int, num: int) -> subprocess.Popen[bytes]:
    """strace, which kills a process at its write number `num`; returns when it watches."""
    words = ["strace", "-f", "-q", "-o", "/dev/null", "-p", str(process), "-e", f"trace={WRITES}"]
    tracer = subprocess.Popen([*words, "-e", f"inject={WRITES}:signal=SIGKILL:when={num}"], stderr=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in Path(f"/proc/{process}/status").read_text():
        assert tracer.poll() is None, "strace may not trace here"
        time.sleep(0.002)
    return tracer


@dataclass
class ForkedRun:
    """`tunesmith train` or `resume` in a process that has imported torch already."""

    run: Path
    process: fresh.Process

    def is_alive(self) -> bool:
        return Path(f"/proc/{self.process.pid}").exists()

    def stop(self) -> None:
        Run(self.run).ask_stop()

    def error(self) -> dict[str, Any] | None:
        return ChildProcess(self.run).error()


@dataclass
class KillingLauncher:
    """Kills the first run that it starts at its write number `num`; 0: none."""

    num: int
    tracer: subprocess.Popen[bytes] | None = None
    started: int = 0

    def start(self, run: Path, recipe: Path, environment: Mapping[str, str]) -> ForkedRun:
        words = ["train", "--recipe", str(recipe), "--out", str(run)]
        if (run / "run.json").exists():
            words = ["resume", str(run)]
        go = run.parent / f".{run.name}.go{self.started}"
        with open(run.parent / f".{run.name}.output", "wb") as out:
            code = RUN.format(go=str(go))
            process = fresh.Process("-c", code, *words, "--json", "--offline", cwd=run.parents[2], stdout=out.fileno())
        if self.num and not self.started:
            self.tracer = traced(process.pid, self.num)
        self.started += 1
        go.touch()
        return ForkedRun(run, process)

    def find(self, run: Path) -> None:
        return None


def real_outcome(folder: Path, num: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """(number of starts, everything that a client and the disk have of a real job whose run is killed at a write)."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tunesmith.jobs.routes.new_id", lambda kind: kind + "A" * 24)
    model_folder(folder / "tiny")
    store = Store(folder / "store")
    file = put_file(store, chats(folder / "rows.jsonl", 18).read_bytes())
    valid = put_file(store, chats(folder / "valid.jsonl", 4, seed=4).read_bytes(), "file-b")
    how = {"n_epochs": 2, "batch_size": 3}
    body = JobBody(model="tiny", training_file=file, validation_file=valid, seed=3, hyperparameters=how)
    name = str(create_job(store, REAL, body)["id"])
    models, launcher = FakeModels(), KillingLauncher(num)
    working = Dispatcher(store, REAL, launcher, models)
    while (job := store.job(name) or {})["status"] not in ENDED:
        working.round()
        time.sleep(0.02)
    run = Run(store.runs_path / name)
    said = store.page(events, events.c.job == name, limit=100)[0]
    assert len({row["id"] for row in said}) == len(said)
    kept = [row for row in said if not re.search(r"again|continues after|^Created|^Validating", row["message"])]
    found = {
        "job": {key: job[key] for key in ("status", "error", "numbers", "trained_tokens")},
        "events": sorted((row["id"], CHOSEN.sub("", row["message"]), str(row["data"])) for row in kept),
        "results": store.content_path(job["result_file"]).read_bytes(),
        "served": sorted(models.served),
        "weights": {path: one for path, one in tree(run.path).items() if path.endswith(".safetensors")},
        "files": sorted(tree(run.path)),
        "left": sorted(path.name for path in store.runs_path.iterdir() if path.name[0] != "."),
    }
    store.close()
    if launcher.tracer is not None:
        launcher.tracer.wait()
    return launcher.started, found


@needs_strace
@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("part", range(4))
def test_a_run_killed_at_its_writes_ends_as_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """TUNESMITH_KILL_STRIDE=1 for each of them."""

    def made(num: int) -> tuple[int, dict[str, Any]]:
        (folder := tmp_path / str(num)).mkdir()
        try:
            return real_outcome(folder, num, monkeypatch)
        finally:
            shutil.rmtree(folder)

    starts, whole = made(0)
    assert (starts, whole["job"]["status"]) == (1, "succeeded")
    num, killed = 1 + part * STRIDE, 0
    while True:
        starts, found = made(num)
        for key in whole:
            assert found[key] == whole[key], f"{key}, killed at write {num}"
        if starts == 1:
            break
        killed, num = killed + 1, num + 4 * STRIDE
    print(f"{killed} kills, the last at write {num - 4 * STRIDE}")
    assert killed > 2
