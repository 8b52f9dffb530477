"""While other programs want the cores, threads that wait for each other sleep; with the machine to itself they spin."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts how long threads waited for a core")

WAITING = """
import json, sys, time
import torch
from tunesmith.models import contention

torch.set_num_threads(2)
values = torch.ones(1 << 17)

def waited():  # seconds of processor time of 100 regions that two threads share, with 2 ms of nothing after each
    values.add_(1)
    before = time.process_time()
    for _ in range(100):
        values.add_(1)
        time.sleep(0.002)
    return time.process_time() - before

if sys.argv[1] == "team":
    spinning = waited()
    team = contention.IdleTeam()
    time.sleep(0.2)
    sleeping = waited()
    team.end()
    time.sleep(0.2)
    print(json.dumps([spinning, sleeping, waited()]))
else:
    made = []
    class Team(contention.IdleTeam):
        def __init__(self): made.append("sleep"); super().__init__()
        def end(self): made.append("spin"); super().end()
    contention.IdleTeam, contention.INTERVAL_S, contention.QUIET_INTERVALS = Team, 0.1, 5
    contention.watch()
    contention.watch()  # a second call begins nothing
    print(flush=True)
    until = time.monotonic() + 30
    while len(made) < int(sys.argv[2]) and time.monotonic() < until:
        values.add_(1)
    print(json.dumps(made))
"""


def start(*words: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    words = (sys.executable, "-c", WAITING, *words)
    return subprocess.Popen(words, env={**clean, "OMP_NUM_THREADS": "2"}, stdout=subprocess.PIPE, text=True)


def told(child: subprocess.Popen[str]) -> list[object]:
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    return list(json.loads(printed))


def needs_libgomp() -> None:
    import torch

    if "OpenMP" not in torch.__config__.parallel_info() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("torch's threads are not libgomp's here, or there is one core")
    from tunesmith.models.contention import _libgomp

    if _libgomp() is None:
        pytest.skip("torch's threads are not libgomp's here")


@pytest.mark.slow  # both ask for cores of their own, and compute for seconds
def test_an_idle_team_makes_waiting_threads_sleep_until_it_ends() -> None:
    needs_libgomp()
    spinning, sleeping, again = told(start("team"))
    assert isinstance(spinning, float)
    assert isinstance(sleeping, float)
    assert isinstance(again, float)
    # Spinning through 2 ms a hundred times is 0.2 s of processor time, where the thread has a core for it.
    assert sleeping < 0.5 * spinning
    assert sleeping < 0.5 * again


@pytest.mark.slow
def test_threads_sleep_while_another_program_wants_their_cores() -> None:
    needs_libgomp()
    child = start("watch", "1")
    assert child.stdout is not None
    assert child.stdout.readline() == "\n", "it has imported what it needs, and watches"
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        assert told(child) == ["sleep"]
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_a_person_has_set_stays() -> None:
    needs_libgomp()
    watches = "from tunesmith.models.contention import watch; watch()"
    script = f"import torch, threading; {watches}; print(threading.active_count())"
    env = {**os.environ, "GOMP_SPINCOUNT": "2000"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
