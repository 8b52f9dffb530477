"""What torch and its libraries read from the environment when they start: set here once, unless a person has set it."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from tunesmith.errors import InputError

SHAPES = "192"
BUSY = 1
"""Other threads that run or want to, at every look, from which on the machine has other work."""
LOOKS = 5
KEPT_FREE = str(2**30)
"""Bytes of freed memory at the end of the heap."""
NAMES = (
    "GOMP_SPINCOUNT",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
    "MALLOC_MMAP_MAX_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_ARENA_MAX",
    "PYTORCH_ALLOC_CONF",
)
MALLOC = (("MALLOC_MMAP_MAX_", -4, "0"), ("MALLOC_TRIM_THRESHOLD_", -1, KEPT_FREE), ("MALLOC_ARENA_MAX", -8, "1"))
"""Names, numbers in glibc's malloc.h, values."""


def prepare_environment(environ: MutableMapping[str, str], others: Callable[[], int], *, answers: bool = False) -> None:
    """Settings that measurably help, for this process and those it starts; what is set already counts more.

    `answers`: whether the process writes answers, whose many short waits cost less when they are spun through. To be
    called before torch is imported. What was measured: docs/EXPERIMENTS.md.
    """
    # Of each shape of a product oneDNN keeps what it compiled, more than half a MiB, and so does torch's layer above
    # it: 1,024 each. Rows have all lengths, so that both fill up. A pass needs 35 to 50, and more
    # where it has many long rows of different lengths.
    environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", SHAPES)
    environ.setdefault("LRU_CACHE_CAPACITY", SHAPES)
    _keep_freed_memory(environ)
    # Passes of all sizes leave holes between blocks of a card's memory. PyTorch's CUDA notes recommend this for such
    # programs; it was never run here, since no card was there.
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in environ:  # its older name
        environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # While other programs run, threads that wait for each other should soon go to sleep. A server's clients are such
    # programs too, and its waits are short; for what does not answer, contention.py looks while it runs.
    if answers and others() >= BUSY:
        environ.setdefault("GOMP_SPINCOUNT", "20000")


def _keep_freed_memory(environ: MutableMapping[str, str]) -> None:
    """Every step allocates the same gradients and temporaries. glibc maps large ones one by one and gives them back
    when they are freed, so that the kernel clears the same pages again in every step: it keeps up to a GiB instead.
    In one heap for all threads: of what a thread that is done has freed in a heap of its own nobody gets anything.

    It reads the environment before a program begins: children heed it, this process is told by mallopt (malloc.h).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for name, parameter, value in MALLOC:
        if name not in environ:
            environ[name] = value
            if mallopt is not None:  # another C library than glibc has none
                mallopt(parameter, int(value))


def refuse_ranks(environ: Mapping[str, str]) -> None:
    """Raise InputError in one of several processes that torchrun or `accelerate launch` started for one training."""
    ranks = environ.get("WORLD_SIZE", "")
    if ranks.isdecimal() and int(ranks) > 1:
        raise InputError(
            f"WORLD_SIZE={ranks}: torchrun or accelerate launch started {ranks} processes, but a run trains in one "
            "process on one device, and each of them would train all of it. Start tunesmith without a launcher; if "
            "there is none, unset WORLD_SIZE."
        )


def for_child(**more: str) -> dict[str, str]:
    """What a process is started with that imports this package, wherever it lies, by `python -m`; and `more`."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def in_force(environ: Mapping[str, str]) -> dict[str, str]:
    """What is set of these, by whomever; a library's own default where nothing is."""
    return {name: environ.get(name, "the library's") for name in NAMES}


def others_running() -> int:
    """Threads beside this one that run or want to, the fewest of some looks; 0 where the platform does not tell.

    Not the load of the last minute: a run that follows another would find the machine busy with what is over.
    """
    found = []
    for look in range(LOOKS):
        if look:
            time.sleep(0.004)
        try:
            running = Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0]
        except OSError:
            return 0
        found.append(int(running) - 1)
    return min(found)


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> tuple[int, str]:
    """Default number of threads, and why: OMP_NUM_THREADS if it is set, else the cores of this process."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted), "OMP_NUM_THREADS is set"
    num = cores()
    return num, f"{num} core{'s are' if num > 1 else ' is'} free to this process"


_NEEDED_BY = re.compile(r"(?P<package>[^;]+?)\s*;\s*extra\s*==\s*[\"'](?P<extra>[^\"']+)[\"']")


def installing(extra: str) -> str:
    """The command that installs what an extra of tunesmith needs, into the Python that runs.

    It names the packages and not `tunesmith[extra]`, which an index would have to know: tunesmith is installed from a
    checkout.
    """
    python = shlex.quote(sys.executable or "python")
    try:
        found = [_NEEDED_BY.fullmatch(text) for text in requires("tunesmith") or ()]
    except PackageNotFoundError:  # its source runs without being installed
        found = []
    packages = [match["package"] for match in found if match and match["extra"] == extra]
    return f"{python} -m pip install {' '.join(map(shlex.quote, packages)) or shlex.quote('.[' + extra + ']')}"
