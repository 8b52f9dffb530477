"""A probe from outside: a child process that ends with us, within a time, and leaves nothing behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tunesmith.environment import for_child
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.atomic import remove, temporary_folder
from tunesmith.training.probing.found import Found
from tunesmith.training.resolve import OnProgress

LIMIT_S = 600.0
"""A probe that is not done by then is ended; what it found until then counts."""
KILLED = "the system killed it, as it does where memory ends"


def probe(recipe: Recipe, *, root: Path, offline: bool, on_progress: OnProgress, limit_s: float = LIMIT_S) -> Found:
    """Live through the heaviest moments of a run whose every "auto" is decided. Nothing of it stays below `root`.

    Never raises for what ends the child: `Found.ended` tells it.
    """
    folder = temporary_folder(root, "probe")
    try:
        with open(folder / "printed", "w+b") as printed:
            child = _Child(recipe, root=root, folder=folder, offline=offline, printed=printed)
            with child:
                found = child.listen(on_progress, limit_s)
            if not found.ended:
                found.ended = child.why_ended(printed, limit_s)
            return found
    finally:
        remove(folder)


class _Child:
    def __init__(self, recipe: Recipe, *, root: Path, folder: Path, offline: bool, printed: Any) -> None:
        born = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tunesmith.training.probing.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env=for_child(),
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us, who end it
        )
        # It is a part of a plan, which tells what does not fit; whether it fits has been asked.
        plain = {**recipe.model_dump(mode="json"), "memory": "warn"}
        self._told = {"recipe": plain, "root": str(root), "folder": str(folder), "offline": offline, "born": born}
        self._is_late = threading.Event()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None, "it has a pipe"
        assert self._process.stdout is not None, "it has a pipe"
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except OSError:  # what could not be said any more
                continue

    def listen(self, on_progress: OnProgress, limit_s: float) -> Found:
        """All that it says until it ends."""
        found = Found()
        timer = threading.Timer(limit_s, self._end_late)
        timer.start()
        try:
            assert self._process.stdin is not None, "it has a pipe"
            assert self._process.stdout is not None, "it has a pipe"
            self._process.stdin.write(json.dumps(self._told) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    on_progress(*message["progress"])
                else:
                    found.hear(message)
        except BrokenPipeError:  # it ended before it heard what to do
            pass
        finally:
            timer.cancel()
        self._process.wait()
        return found

    def why_ended(self, printed: Any, limit_s: float) -> str:
        """In words; empty: it came to its end."""
        code = self._process.returncode
        if self._is_late.is_set():
            return f"it was not done within {limit_s:,.0f} s"
        if code == -signal.SIGKILL:
            return KILLED
        printed.seek(0)
        lines = [line for line in printed.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return "" if code == 0 else f"exit code {code}{': ' + lines[-1][:300] if lines else ''}"

    def _end_late(self) -> None:
        self._is_late.set()
        self._process.kill()
