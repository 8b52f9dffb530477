"""`python -m parallel.forked_ranks MODULE WORDS`: MODULE as the agent of ranks that are forked from it.

They start in a tenth of the time of new processes, for tests of what an agent and its ranks do after their start.
"""

import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import IO, Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler


class Forked:
    """A rank, as far as the agent uses subprocess.Popen."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], stdout: Any, stderr: Any, **how: Any) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be_rank(args[args.index("-m") + 1 :], env, {1: stdout, 2: stderr})

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float = 1e9) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def _be_rank(words: Sequence[str], env: Mapping[str, str], streams: Mapping[int, IO[str] | None]) -> None:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number, stream in streams.items():
        if stream is not None:
            os.dup2(stream.fileno(), number)
    os.environ.clear()
    os.environ.update(env)
    code = 1
    try:
        _run(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def _run(words: Sequence[str]) -> None:
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    subprocess_handler.Popen = Forked  # type: ignore[misc,assignment]
    _run(sys.argv[1:])
