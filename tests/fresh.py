"""New processes in a tenth of the time: forked from one that has imported torch and tunesmith, and nothing of a test.

Each has arguments, environment, folder and streams of its own, and ends alone. What is decided while Python starts or
libraries are imported needs a process of its own.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

SERVER = """
import gc, json, os, runpy, signal, socket, sys, traceback
sys.path[:0] = json.loads(sys.argv[1])
import torch, transformers.models.llama.modeling_llama
import tunesmith.inference.measure, tunesmith.evaluation.report.plots, tunesmith.training.trainer
torch.set_num_threads(1)
gc.freeze()

def run(words, cwd, env):
    os.chdir(cwd)
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

requests = socket.socket(fileno=int(sys.argv[2]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    words, fds, *_ = socket.recv_fds(requests, 1 << 20, 4)
    if not words:
        break
    if os.fork() == 0:  # one that waits for the process, and says how it ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requests.close()
        pid = os.fork()
        if pid == 0:
            for number, fd in enumerate(fds[:3]):
                os.dup2(fd, number)
            for fd in fds:
                os.close(fd)
            run(**json.loads(words))
        for fd in fds[:3]:
            os.close(fd)
        os.write(fds[3], f"{pid}\\n".encode())
        os.write(fds[3], f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\\n".encode())
        os._exit(0)
    for fd in fds:
        os.close(fd)
"""


@lru_cache
def _server() -> socket.socket:
    """It ends with this process, which alone has the other end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, "-c", SERVER, json.dumps([path for path in sys.path if path]), str(theirs.fileno())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    subprocess.Popen(words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=environment)
    theirs.close()
    return ours


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
            socket.send_fds(_server(), [json.dumps(what).encode()], fds)
        if read is not None:
            os.close(write)
            self.stdout = open(read)  # noqa: SIM115
        self._ends, self._end = ends, ends.makefile()
        self.pid = int(self._end.readline())

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
