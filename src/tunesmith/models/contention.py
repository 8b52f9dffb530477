"""Threads that wait for each other give their cores away while other programs want them.

torch's OpenMP threads spin while they wait. With the machine to itself that is faster than sleeping; beside other
programs the thread that is waited for often has no core, and the spinning one keeps it from getting one. How long
libgomp spins is fixed when a process starts, but for one rule that its manual documents (GOMP_SPINCOUNT): where it
manages more threads than there are cores, threads spin 100 turns and then sleep. So an idle team of threads more makes
all others sleep while they wait, for as long as it exists. What was measured: docs/EXPERIMENTS.md.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

from tunesmith.environment import cores

LOOK_S = 0.5
SHARE = 0.10
"""Seconds that the threads of this process waited for a core, by second of time, from which on the machine is busy."""
QUIET_SHARE = 0.03
QUIET_LOOKS = 8
"""Looks one after the other below `QUIET_SHARE` after which threads spin again."""
TASKS = "/proc/self/task"

_began = threading.Lock()


def watch() -> None:
    """Begin to look every half second whether other programs want the cores, once a process, in a daemon thread.

    Nothing is done where the platform does not count the waiting (anything but Linux), where torch's threads are not
    libgomp's, or where a person has set how threads wait.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() or _waited_s() is None or _libgomp() is None:
        return
    if _began.acquire(blocking=False):
        threading.Thread(target=_watch, name="contention", daemon=True).start()


class IdleTeam:
    """Threads of libgomp that do nothing; `end` ends them."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="idle team", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        library = _libgomp()
        if library is not None:
            # Every program that gcc compiled with OpenMP begins its parallel regions by this call. A team counts its
            # threads but one; with as many as there are cores it is enough whatever teams there are already.
            nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
            library.GOMP_parallel(nothing, None, ctypes.c_uint(max(2, cores())), ctypes.c_uint(0))
        self._over.wait()

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def _watch() -> None:
    team: IdleTeam | None = None
    waited, at, quiet = _waited_s() or {}, time.monotonic(), 0
    while True:
        time.sleep(LOOK_S)
        now, found = time.monotonic(), _waited_s() or {}
        # A thread that has ended since is left out: its count is gone.
        share = sum(total - waited.get(name, 0.0) for name, total in found.items()) / (now - at)
        waited, at = found, now
        quiet = quiet + 1 if share < QUIET_SHARE else 0
        if team is None and share > SHARE:
            team = IdleTeam()
        elif team is not None and quiet >= QUIET_LOOKS:
            team.end()
            team = None


def _waited_s() -> dict[str, float] | None:
    """Seconds that each thread of this process was ready to run and had no core; None where nobody counts them."""
    found: dict[str, float] = {}
    try:
        for task in os.listdir(TASKS):
            try:
                with open(f"{TASKS}/{task}/schedstat", encoding="ascii") as file:
                    found[task] = int(file.read().split()[1]) / 1e9
            except (FileNotFoundError, ProcessLookupError):  # it has ended, or nothing is counted
                continue
    except (OSError, ValueError, IndexError):
        return None
    return found or None


def _libgomp() -> ctypes.CDLL | None:
    """The one that is loaded already; None where there is none."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in lines:
        path = line.rpartition(" ")[2]
        if "libgomp" in Path(path).name:
            return ctypes.CDLL(path)
    return None
