"""Child processes of this package: their environment, their commands, and `multiprocessing` without
surprises."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

SAFE_PATH = {"PYTHONSAFEPATH": "1"}
"""Python 3.11 and later then leaves the working folder out of the path of imports."""
DROP_FOLDER = "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
"""First words of a program by `python -c` that do the same in every version."""


def for_child(**more: str) -> dict[str, str]:
    """The environment of a child process that imports this package, with `more` variables.

    Nothing is imported from the working folder: a file torch.py in it is not the user's program.
    """
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
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
