"""Threads that wait for each other give their cores away while other programs want them.

torch's OpenMP threads spin while they wait. Alone that is faster than sleeping; next to other programs the
thread that is waited for often has no core, and the spinning one keeps it from getting one: a run next to six
busy loops made no two steps in 28 seconds. libgomp fixes how long threads spin when a process starts, with one
exception in its manual (GOMP_SPINCOUNT): while it manages more threads than there are cores, threads spin 100
turns and then sleep. So an additional, idle team of threads makes all others sleep while they wait, for as long
as it exists, and a run gets its fair share of the cores. Measured: docs/inside/EXPERIMENTS.md.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

from tunesmith.environment.process import num_cpus

INTERVAL_S = 0.5
BUSY_SHARE, BUSY_INTERVALS = 0.25, 2
"""Seconds that the threads of this process waited for a core, per second; above it BUSY_INTERVALS times in a
row, threads sleep. One busy loop gives 0.3 and more, a server with ten requests a second less than 0.11."""
QUIET_SHARE, QUIET_INTERVALS = 0.15, 8
"""After QUIET_INTERVALS in a row below this share threads spin again."""
THREADS = "/proc/self/task"

_started = threading.Lock()


def watch() -> None:
    """Start a daemon thread, once a process, that checks each half second if other programs want the cores.

    Does nothing where the platform does not count the waiting (other than Linux), where torch's threads are not
    libgomp's, or where the environment says how threads wait.
    """
    if {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys() or not _seconds_waited() or _libgomp() is None:
        return
    if _started.acquire(blocking=False):
        threading.Thread(target=_watch, name="contention", daemon=True).start()


class IdleTeam:
    """Threads of libgomp that do nothing until `end`."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="idle team", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        library = _libgomp()
        if library is not None:
            # The call by which code compiled by gcc starts a parallel region. A team counts its threads but
            # one; with as many as there are cores it is enough, whatever teams exist already.
            nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
            library.GOMP_parallel(nothing, None, ctypes.c_uint(max(2, num_cpus())), ctypes.c_uint(0))
        self._over.wait()

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def _watch() -> None:
    team: IdleTeam | None = None
    before, at, busy, quiet = _seconds_waited(), time.monotonic(), 0, 0
    while True:
        time.sleep(INTERVAL_S)
        now, waited = time.monotonic(), _seconds_waited()
        share = sum(total - before.get(thread, 0.0) for thread, total in waited.items()) / (now - at)
        before, at = waited, now
        busy = busy + 1 if share > BUSY_SHARE else 0
        quiet = quiet + 1 if share < QUIET_SHARE else 0
        if team is None and busy >= BUSY_INTERVALS:
            team = IdleTeam()
        elif team is not None and quiet >= QUIET_INTERVALS:
            team.end()
            team = None


def _seconds_waited() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run and had no core; empty: not counted."""
    waited: dict[str, float] = {}
    try:
        for thread in os.listdir(THREADS):
            try:
                with open(f"{THREADS}/{thread}/schedstat", encoding="ascii") as file:
                    waited[thread] = int(file.read().split()[1]) / 1e9
            except (FileNotFoundError, ProcessLookupError):  # it has ended, or nothing is counted
                continue
    except (OSError, ValueError, IndexError):
        return {}
    return waited


def _libgomp() -> ctypes.CDLL | None:
    """The library that is loaded already; None where there is none."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    paths = (line.rpartition(" ")[2] for line in lines)
    path = next((path for path in paths if "libgomp" in Path(path).name), None)
    return None if path is None else ctypes.CDLL(path)
