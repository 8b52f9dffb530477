"""Processes that run the code of graders, see `child`: started once, each for one grade at a time."""

from __future__ import annotations

import json
import os
import queue
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress

from tunesmith.environment.children import for_child, python_words
from tunesmith.errors import InputError
from tunesmith.graders import schema
from tunesmith.graders.grade import GradeError
from tunesmith.types import JsonObject, Record

LOAD_S = 60.0
"""Longest time that loading the code of a grader may take."""
STARTING_GRACE_S = 10.0
"""Beyond the limit of a grade, which its process keeps by itself."""
KEPT_ENV = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "PYTHONSAFEPATH")
FIXED_ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class Children:
    """Runs the code of one grader, in a process for each grade that is made at the same time."""

    def __init__(self, grader: schema.LimitedGrader) -> None:
        if not hasattr(os, "fork"):
            raise InputError(f"{grader.type}: code of graders needs Linux or macOS. On Windows, run tunesmith in WSL.")
        self._grader = grader
        self._idle: queue.LifoQueue[_Child] = queue.LifoQueue()
        first = _Child(grader)
        self._all = [first]
        self.files: Mapping[str, str] = first.files
        """SHA-256 of the files that the grader is made of."""
        self.offline: bool = first.offline
        """Whether its code has no network."""
        self.closes_network = isinstance(grader, schema.OfflineGrader)
        self._idle.put(first)

    def ask(self, request: Record, times: int = 1) -> Record:
        """The value and the scores of a request that takes up to `times` the limit. Raises GradeError."""
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            child = _Child(self._grader)
            self._all.append(child)
        if child.files != self.files:
            child.end()
            raise GradeError("died", f"{_place(self._grader)}: its files were edited meanwhile, or its run has ended")
        try:
            answer = child.ask(request, self._grader.seconds * times + STARTING_GRACE_S)
        except (GradeError, RecursionError):
            self._all.remove(child)
            child.end()
            raise
        words = child.last_words(answer.get("kind", ""))  # before another grade takes it and empties its log
        self._idle.put(child)
        if "kind" in answer:
            raise GradeError(answer["kind"], answer["error"] + words)
        return answer

    def close(self) -> None:
        """End all processes, also those at work."""
        self.files = {"": "closed"}  # which no process has: a grade under way gets none
        for child in list(self._all):  # a grade that ends so takes its own out
            child.end()


def runs_offline() -> bool:
    """Whether this system lets the code of an `OfflineGrader` run without network, as a process for one finds
    out. Raises InputError where such code cannot run at all."""
    children = Children(schema.UnitTests(type="unit_tests"))
    children.close()
    return children.offline


class _Child:
    def __init__(self, grader: schema.LimitedGrader) -> None:
        names = (*KEPT_ENV, *getattr(grader, "env", ()))
        env = {name: value for name, value in for_child().items() if name in names} | FIXED_ENVIRONMENT
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        self._folder = tempfile.TemporaryDirectory(prefix="grader-")
        self._process = subprocess.Popen(
            python_words("tunesmith.graders.child"), env=env, cwd=self._folder.name, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, bufsize=0,
        )  # fmt: skip
        try:
            loaded = self.ask(_to_load(grader, self._folder.name), LOAD_S)
            if "kind" in loaded:
                raise GradeError(loaded["kind"], loaded["error"])
        except GradeError as error:
            self.end()
            raise InputError(f"{_place(grader)}: the grader cannot be loaded: {error}") from None
        self.files, self.offline = loaded["files"], loaded["offline"]

    def ask(self, request: Record, seconds: float) -> Record:
        """Raises GradeError where the process ends, or says nothing in time."""
        out = self._process.stdout
        assert out is not None, "it is a pipe"
        assert self._process.stdin is not None, "it is a pipe"
        line = b""
        with suppress(OSError):  # it has ended, which the empty line says
            data = memoryview(json.dumps(request, default=str).encode() + b"\n")
            while data:
                data = data[self._process.stdin.write(data) :]
            ends = time.monotonic() + seconds
            while not line.endswith(b"\n") and (left := ends - time.monotonic()) > 0:
                if select.select([out], [], [], left)[0]:
                    new = os.read(out.fileno(), 1 << 16)
                    if not new:
                        break
                    line += new
            else:
                if not line.endswith(b"\n"):
                    raise GradeError("timeout", f"it took more than {seconds:g} s and was ended")
        if not line.endswith(b"\n"):
            raise GradeError("died", "the process of the grader ended by itself" + self.last_words("died"))
        answer: JsonObject = json.loads(line)
        return answer | {"error": self._without_folder(answer["error"])} if "error" in answer else answer

    def last_words(self, kind: str) -> str:
        """Last lines that a process printed before it died."""
        if kind != "died":
            return ""
        size = os.fstat(self._log.fileno()).st_size
        end = os.pread(self._log.fileno(), 1000, max(0, size - 1000)).decode("utf-8", "replace")
        lines = self._without_folder(end).strip().splitlines()
        return f"; it printed last: {lines[-1]}" if lines else ""

    def _without_folder(self, text: str) -> str:
        """A text with `grader.py` in place of where we wrote that file, which means nothing to its reader."""
        return text.replace(self._folder.name + os.sep, "")

    def end(self) -> None:
        """End the process with all that it started; once, since its number may be another's later."""
        if self._log.closed:
            return
        with suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._log.close()
        self._folder.cleanup()


def _place(grader: schema.LimitedGrader) -> str:
    return grader.file if isinstance(grader, schema.Function) else grader.name or grader.type


def _to_load(grader: schema.LimitedGrader, folder: str) -> JsonObject:
    """Source that a process loads, with its limits; the text of a Python grader as a file in `folder`."""
    limits = {
        "seconds": grader.seconds,
        "memory_bytes": int(grader.memory_gib * 2**30),
        "offline": isinstance(grader, schema.OfflineGrader),
    }
    if isinstance(grader, schema.UnitTests):
        return {"what": "tests", **limits}
    if isinstance(grader, schema.Function):
        return {"what": "file", "file": grader.file, "function": grader.function, **limits}
    if isinstance(grader, schema.Python):
        file = os.path.join(folder, "grader.py")
        with open(file, "w", encoding="utf-8") as out:
            out.write(grader.source)
        return {"what": "file", "file": file, "function": "grade", **limits}
    return {"what": "text", "grader": grader.model_dump(mode="json", by_alias=True), **limits}
