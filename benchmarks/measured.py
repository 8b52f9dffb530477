"""A child process measured from outside, and the machine it runs on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "scikit-learn", "numpy")
TAIL_LINES = 25


@dataclass(frozen=True, slots=True)
class Child:
    """A process that has ended."""

    code: int
    wall_seconds: float
    """From its start to its end, imports included."""
    peak_bytes: int
    """Most memory resident at once in it, or in one of its own children where one held more; never less than what this
    process holds, which the kernel puts to the account of a new one. So nothing here imports torch."""
    load_before: float
    """Processes that wanted to run in the minute before, from os.getloadavg: what it shared the machine with."""
    tail: str
    """The last lines of what it printed."""


def environment() -> dict[str, str]:
    """What a command is run with: the package of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def median_seconds(way: Callable[[], object], rounds: int = 9) -> float:
    """Of one call, after a first that may compile."""
    way()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def run_child(words: Sequence[str], *, log: Path, settings: Mapping[str, str] | None = None) -> Child:
    """Run a command to its end, with the package of this checkout and `settings` in its environment; what it prints
    goes to `log`."""
    load = os.getloadavg()[0]
    with open(log, "wb") as file:
        begun = time.perf_counter()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**environment(), **(settings or {})},
        )
        try:
            # wait4 and not wait: it alone tells the memory of this child, whatever ran before it.
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        seconds = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return Child(
        code=process.returncode,
        wall_seconds=seconds,
        peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),  # bytes there, KiB elsewhere
        load_before=load,
        tail="\n".join(lines[-TAIL_LINES:]),
    )


def run_peer(
    job: Mapping[str, Any], folder: Path, name: str, script: str, *, python: str = sys.executable,
    settings: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """What a script of `peers` finds for a job in a process of its own, with `peak_bytes` and `load_before` of it.

    It is kept in `folder` as `name`.json, and a later call takes it from there. None: it failed, which is printed.
    `settings`: more of its environment.
    """
    result = folder / f"{name}.json"
    if not result.exists():
        of_job, part = folder / f"{name}-job.json", folder / f"{name}.part"
        of_job.write_text(json.dumps({**job, "name": name}), "utf-8")
        words = [python, str(PEERS / f"{script}.py"), str(of_job), str(part)]
        threads = {"OMP_NUM_THREADS": str(job["threads"])}
        child = run_child(words, log=folder / f"{name}.log", settings={**threads, **(settings or {})})
        if child.code:
            print(f"{folder.name}: {name} failed:\n{child.tail}", file=sys.stderr)
            return None
        found = json.loads(part.read_text("utf-8"))
        found |= {"peak_bytes": child.peak_bytes, "load_before": child.load_before}
        result.write_text(json.dumps(found), "utf-8")
    return dict(json.loads(result.read_text("utf-8")))


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def versions() -> dict[str, str]:
    """Of Python, this checkout and the libraries; a library that is not installed is "absent"."""
    found = {"python": platform.python_version(), "tunesmith": _commit()}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]  # of torch, which build it is
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _commit() -> str:
    """The commit of this checkout, with a + where tracked files differ from it."""
    words = ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git"
