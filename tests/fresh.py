"""New processes in a tenth of the time: forked from one that has imported torch and tunesmith, and nothing of a test.

Each has arguments, environment, folder and streams of its own, and ends alone. What is decided while Python starts or
libraries are imported needs a process of its own. `python` is for programs that start processes by `sys.executable`.
"""

import atexit
import json
import multiprocessing
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import IO

import pytest

import fresh_server

PYTHON = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
fds = [fd for fd in range(64) if fd != server.fileno() and os.path.exists(f"/dev/fd/{{fd}}")]
server.connect({place!r})
what = {{"words": sys.argv[1 + (sys.argv[1] == "-u") :], "cwd": os.getcwd(), "env": dict(os.environ)}}
socket.send_fds(server, [json.dumps(what).encode()], fds)
said = server.makefile()
pid = int(said.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
code = int(said.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


_STARTED: list[tuple[socket.socket, Path]] = []
"""The server of this process, once it is needed: its socket, and the executable `python`."""


def fork_now() -> None:
    """Let the server be a fork of this process, which has imported no test yet: it then imports nothing by itself."""
    os.environ |= _ENVIRONMENT
    fresh_server.import_all()
    _STARTED.append(_start(fresh_server.fork_server))


_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _in_a_new_process(requests: socket.socket, others: socket.socket) -> None:
    fds = [requests.fileno(), others.fileno()]
    paths = json.dumps([path for path in sys.path if path])
    words = [sys.executable, fresh_server.__file__, paths, *map(str, fds)]
    subprocess.Popen(words, pass_fds=fds, stdin=subprocess.DEVNULL, env={**os.environ, **_ENVIRONMENT})


def _start(serve: Callable[[socket.socket, socket.socket], None]) -> tuple[socket.socket, Path]:
    """The server ends with this process, which alone has the other end of its socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "python").write_text(PYTHON.format(python=sys.executable, place=str(folder / "socket")))
    (folder / "python").chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as others, theirs:
        others.bind(str(folder / "socket"))
        others.listen(16)
        serve(theirs, others)
    return ours, folder / "python"


def _server() -> tuple[socket.socket, Path]:
    if not _STARTED:
        _STARTED.append(_start(_in_a_new_process))
    return _STARTED[0]


def python() -> Path:
    """An executable that is `python` for `-m`, `-u -m` and `-c`. Its process is another, which ends with it."""
    return _server()[1]


class Process:
    """`python WORDS`, as far as tests use subprocess.Popen. `stdout`: a file; without one its output can be read here.

    Errors are kept in a file until the end. Attributes: `pid`, `stdout`, and after the end `returncode`.
    """

    def __init__(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        stdout: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.stdout: IO[str] | None = None
        self.returncode: int | None = None
        self._errors = TemporaryFile("w+")  # noqa: SIM115
        ends, theirs = socket.socketpair()
        read, write = (None, stdout) if stdout is not None else os.pipe()
        what = {"words": [*map(str, words)], "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
        with open(os.devnull) as nothing, theirs:
            fds = [nothing.fileno(), write, self._errors.fileno(), theirs.fileno()]
            socket.send_fds(_server()[0], [json.dumps(what).encode()], fds)
        if read is not None:
            os.close(write)
            self.stdout = open(read)  # noqa: SIM115
        self._ends, self._end = ends, ends.makefile()
        self.pid = int(self._end.readline())

    def poll(self) -> int | None:
        """See subprocess.Popen."""
        return self.wait() if self.returncode is not None or select.select([self._ends], [], [], 0)[0] else None

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._ends], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
            self.returncode = int(self._end.readline())
            self._end.close()
            self._ends.close()
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """What it said from here on, and all of its errors."""
        said = self.stdout.read() if self.stdout else ""
        self.wait()
        self._errors.seek(0)
        return said, self._errors.read()


def done(*words: str | Path, cwd: Path | None = None) -> str:
    """The output of `python WORDS` that ends well; AssertionError with its errors otherwise."""
    process = Process(*words, cwd=cwd)
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    return said


def fork_instead_of_spawning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes of `multiprocessing` be forks of this one, which has imported what they need: 2 s less for each."""
    if "fork" in multiprocessing.get_all_start_methods():
        forking = multiprocessing.get_context("fork")
        monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: forking)
