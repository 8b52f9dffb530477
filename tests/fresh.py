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
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile, mkdtemp
from typing import IO

import pytest

SERVER = """
import gc, json, os, runpy, select, signal, socket, sys, threading, traceback
sys.path[:0] = json.loads(sys.argv[1])
import tunesmith.training.trainer
sys.imported_by_a_run = frozenset(sys.modules)  # for test_light_side.py
import torch, transformers.models.llama.modeling_llama
import tunesmith.inference.measure, tunesmith.evaluation.report
import tunesmith.planning.devices
torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # as in quiet.py, no pages, and no waiting for other programs
tunesmith.planning.devices.BUSY_S = 0.0
for cards in (torch.cuda, torch.xpu):
    if not cards.is_available():
        cards.manual_seed_all = lambda seed: None
tunesmith.evaluation.report._write_pages = lambda *args, **kwargs: None
gc.freeze()

def run(words, cwd, env):
    os.chdir(cwd)
    sys.path[:] = [path for path in sys.path if path]  # "" would be this folder
    sys.executable = env.pop("FRESH_PYTHON", sys.executable)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv, code = ["-c", *words[2:]], 0
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)

def end_with(fd, pid, has_ended):
    os.read(fd, 1)
    if not has_ended.is_set():  # else its number may be that of another process by now
        os.kill(pid, signal.SIGKILL)

requests, others = socket.socket(fileno=int(sys.argv[2])), socket.socket(fileno=int(sys.argv[3]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    is_other = requests not in select.select([requests, others], [], [])[0]
    source = others.accept()[0] if is_other else requests
    words, fds, *_ = socket.recv_fds(source, 1 << 20, 16)
    if not words:
        if is_other:
            continue
        break
    if is_other:
        fds.insert(3, source.detach())
    if os.fork() == 0:  # one that waits for the process, and says how it ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        others.close()
        pid = os.fork()
        if pid == 0:
            for number, fd in enumerate(fds[:3]):
                os.dup2(fd, number)
            for fd in fds[:4]:
                os.close(fd)
            run(**json.loads(words))
        for fd in (*fds[:3], *fds[4:]):
            os.close(fd)
        try:
            os.write(fds[3], f"{pid}\\n".encode())
        except OSError:
            os.kill(pid, signal.SIGKILL)  # who asked for it was killed
        has_ended = threading.Event()
        if is_other:
            threading.Thread(target=end_with, args=(fds[3], pid, has_ended), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        has_ended.set()
        try:
            os.write(fds[3], f"{code}\\n".encode())
        finally:
            os._exit(0)
    for fd in fds:
        os.close(fd)
"""
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


@lru_cache
def _server() -> tuple[socket.socket, Path]:
    """Its socket, and the executable `python`. It ends with this process, which alone has the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    folder = Path(mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "python").write_text(PYTHON.format(python=sys.executable, place=str(folder / "socket")))
    (folder / "python").chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as others, theirs:
        others.bind(str(folder / "socket"))
        others.listen(16)
        fds = [theirs.fileno(), others.fileno()]
        words = [sys.executable, "-c", SERVER, json.dumps([path for path in sys.path if path]), *map(str, fds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        subprocess.Popen(words, pass_fds=fds, stdin=subprocess.DEVNULL, env=environment)
    return ours, folder / "python"


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
