"""Environment variables that torch and its libraries read at their start; the process: cores, children."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.errors import InputError

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Python 3.11 and later then leaves the working folder out of the path of imports."""
DROP_FOLDER = "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
"""First words of a program by `python -c` that do the same in every version."""
SHAPE_CACHE_SIZE = "192"
HEAP_KEPT_FREE = str(2**30)
"""Bytes of freed memory that glibc keeps at the end of the heap."""
MALLOC = (("MALLOC_MMAP_MAX_", -4, "0"), ("MALLOC_TRIM_THRESHOLD_", -1, HEAP_KEPT_FREE), ("MALLOC_ARENA_MAX", -8, "1"))
"""Variables, parameters of mallopt (malloc.h), values."""
NAMES = (
    "GOMP_SPINCOUNT",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
    *(name for name, _, _ in MALLOC),
    "PYTORCH_ALLOC_CONF",
)


CARD_SHARE = "TUNESMITH_CARD_SHARE"
"""Variable with the share of a card's memory that a process may take."""
SERVING_SHARE = 0.4
"""That of a server whose jobs train on the same card; they have the rest."""


def card_share(usual: float = 1.0) -> float:
    """Share of a card's memory for this process; `usual` if the variable is not set. Raises InputError."""
    text = os.environ.get(CARD_SHARE) or usual
    try:
        share = float(text)
    except ValueError as error:
        raise InputError(f"{CARD_SHARE}={text}: no number. Give a share such as 0.4.") from error
    if not 0 < share <= 1:
        raise InputError(f"{CARD_SHARE}={text}: a share of a card is above 0 and at most 1. Give one such as 0.4.")
    return share


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Set what measurably helps in this process and its children, unless it is set; before torch is imported.

    Measured: docs/inside/EXPERIMENTS.md.
    """
    environ.update(SAFE_PATH)
    # oneDNN and torch's layer above it each keep 1,024 compiled products, more than half a MiB each, one for
    # each shape. Rows have all lengths, so both would fill up; a micro-batch needs 35 to 50.
    environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", SHAPE_CACHE_SIZE)
    environ.setdefault("LRU_CACHE_CAPACITY", SHAPE_CACHE_SIZE)
    # glibc maps large blocks one by one and unmaps them when they are freed, so that the kernel clears the same
    # pages in every step; and memory that one thread frees stays in a heap of its own. One heap that keeps up
    # to a GiB takes 15 % less memory at the peak of a LoRA run. Children read the variables, this process needs
    # mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for name, parameter, value in MALLOC:
        if name not in environ:
            environ[name] = value
            if mallopt is not None:  # glibc alone has it
                mallopt(parameter, int(value))


def refuse_ranks(environ: Mapping[str, str]) -> None:
    """Raise InputError in one of several processes that torchrun or its like started, for what one does."""
    ranks = environ.get("WORLD_SIZE", "")
    if ranks.isdecimal() and int(ranks) > 1:
        raise InputError(
            f"WORLD_SIZE={ranks}: torchrun or its like started {ranks} processes, but only `tunesmith train` "
            "and `resume` run in several. Start this without a launcher; if there is none, unset WORLD_SIZE."
        )


def for_child(**more: str) -> dict[str, str]:
    """The environment of a child process that imports this package, with `more` variables.

    Nothing is imported from the working folder: a file torch.py in it is not the user's program.
    """
    paths = [str(Path(__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, **SAFE_PATH, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def python_words(module: str) -> list[str]:
    """The command that runs a module of this package, in the environment of `for_child`, as `python -m` does,
    but without the working folder on the path of imports."""
    if sys.version_info >= (3, 11):
        return [sys.executable, "-m", module]
    return [sys.executable, "-c", f"{DROP_FOLDER}import runpy; runpy._run_module_as_main({module!r})"]


@contextmanager
def spawning() -> Iterator[None]:
    """A block in which `multiprocessing` starts processes of this package by "spawn".

    They do not import the program's main module, so that a script needs no `if __name__ == "__main__"`, and
    Ctrl-C is not for them. A daemonic process (a worker of multiprocessing.Pool or Celery) may start them too,
    which `multiprocessing` forbids since such a process can be killed and leave children behind: these end with
    it by themselves.
    """
    import multiprocessing  # whoever starts processes has it

    with _SPAWNING:
        config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
        daemon = config.pop("daemon", None)
        main = sys.modules["__main__"]
        if sys.platform != "win32":
            from multiprocessing import resource_tracker, util

            library: Any = util  # its stubs know no assignment
            start = library.spawnv_passfds
            library.spawnv_passfds = lambda path, words, fds: start(path, _safe(words), fds)
            resource_tracker.ensure_running()  # starting it lets Ctrl-C through again
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]) if sys.platform != "win32" else None
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            if daemon is not None:
                config["daemon"] = daemon
            if sys.platform != "win32" and blocked is not None:
                library.spawnv_passfds = start
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


_SPAWNING = threading.Lock()


def _safe(words: Sequence[Any]) -> list[Any]:
    """A command by `python -c` that does not import from the working folder."""
    return [DROP_FOLDER + word if before == "-c" else word for before, word in zip(["", *words], words, strict=False)]


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without network; to be called before peft or transformers import it.

    Where the package `kernels` is installed, bitsandbytes downloads a kernel for CPUs and runs it at import. It
    is hidden here.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    was_loaded, before = "kernels" in sys.modules, sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if was_loaded and before is not None:
            sys.modules["kernels"] = before


def in_force(environ: Mapping[str, str]) -> dict[str, str]:
    """The values of `NAMES`, whoever set them; a library's own default where nothing is set."""
    return {name: environ.get(name, "the library's") for name in NAMES}


def num_cpus() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads(processes: int = 1) -> tuple[int, str]:
    """Default number of threads, and why: OMP_NUM_THREADS if it is set, else the cores of this process, or its
    share of them where several `processes` train together on this machine."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted), "OMP_NUM_THREADS is set"
    num = num_cpus()
    if processes > 1:
        return max(1, num // processes), f"{num} cores for {processes} processes"
    return num, f"{num} core{'s are' if num > 1 else ' is'} free to this process"


def limit_process(*, memory_bytes: int, seconds: float, grace_s: int = 1) -> None:
    """Let this process have `memory_bytes` and `seconds` of a processor beyond what it has taken: then SIGXCPU,
    and `grace_s` later its end. What a system cannot limit (memory on macOS, anything on Windows) stays
    free."""
    with suppress(ImportError):
        import resource

        with suppress(ValueError, OSError):  # a lower limit is in force
            most = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize() + memory_bytes
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CPU, (until := int(time.process_time() + seconds) + 1, until + grace_s))


def resident_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


_NEEDED_BY = re.compile(r"(?P<package>[^;]+?)\s*;\s*extra\s*==\s*[\"'](?P<extra>[^\"']+)[\"']")


def install_command(*extras: str) -> str:
    """The command that installs the packages of extras of tunesmith into the Python that runs.

    It names the packages and not `tunesmith[extra]`, which an index would have to know: tunesmith is installed
    from a checkout.
    """
    python = shlex.quote(sys.executable or "python")
    try:
        requirements = [_NEEDED_BY.fullmatch(text) for text in requires("tunesmith") or ()]
    except PackageNotFoundError:  # its source runs without being installed
        requirements = []
    packages = [match["package"] for match in requirements if match and match["extra"] in extras]
    packages = packages or [f".[{','.join(extras)}]"]
    return f"{python} -m pip install {' '.join(map(shlex.quote, packages))}"
