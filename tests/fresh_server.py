"""The process that `fresh` forks others from: it has imported what a run needs, and nothing of a test.

    python fresh_server.py PATHS REQUESTS OTHERS

PATHS: folders of modules, as JSON; the others are the numbers of sockets. A request is the words after `python`, the
folder and the environment of a process, with its streams and a socket that is told its number, then its exit code.
"""

import faulthandler
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
from tempfile import TemporaryDirectory
from typing import Any

NEEDED = (
    "transformers.models.llama.modeling_llama",
    "tunesmith.inference.measure",
    "tunesmith.evaluation.report",
    "tunesmith.planning.devices",
    "rouge_score.rouge_scorer",  # a run imports it with its first answers: a second
    "pandas",
    "tunesmith.cli.app",
    "tunesmith.serve.worker",
    "tunesmith.jobs.dispatcher",
)
"""What most processes need beside a run's own imports."""


def import_all() -> None:
    """Also of a run alone: `sys.imported_by_a_run`, for test_light_side.py."""
    importlib.import_module("tunesmith.training.trainer")
    sys.imported_by_a_run = frozenset(sys.modules)  # type: ignore[attr-defined]
    for name in NEEDED:
        importlib.import_module(name)


def _make_quiet() -> None:
    """As in quiet.py: no pages, no network, and no waiting for a disk nor for other programs."""
    import torch
    from huggingface_hub import constants

    from tunesmith.evaluation import report
    from tunesmith.planning import devices

    set_num_threads = torch.set_num_threads
    set_num_threads(1)
    # A fork has to make its pool of threads anew, which two threads of it that begin at once do not survive.
    os.register_at_fork(after_in_child=lambda: set_num_threads(1))
    torch.set_num_threads = lambda num: None  # two that wait for each other beside other tests take ten times as long
    os.fsync = lambda descriptor: None
    devices.BUSY_S = 0.0
    constants.HF_HUB_OFFLINE = True
    for cards in (torch.cuda, torch.xpu):
        if not cards.is_available():
            cards.manual_seed_all = lambda seed: None
    report._write_pages = lambda *args, **kwargs: None


def _try_usual_template() -> None:
    """The chat template of most tests is tried in a process of its own: once here, not in each process anew."""
    from transformers import AutoTokenizer

    from tiny import tiny_tokenizer
    from tunesmith.data.chat_template import ChatTemplate

    with TemporaryDirectory() as folder:
        tiny_tokenizer().save_pretrained(folder)
        ChatTemplate(AutoTokenizer.from_pretrained(folder))


def serve(requests: socket.socket, others: socket.socket) -> None:
    """Fork a process for each request, until the other end of `requests` is closed.

    `others` takes the requests of processes that `fresh.python` stands for.
    """
    _make_quiet()
    _try_usual_template()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        is_other = requests not in select.select([requests, others], [], [])[0]
        source = others.accept()[0] if is_other else requests
        words, fds, *_ = socket.recv_fds(source, 1 << 20, 16)
        if not words:
            if is_other:
                continue
            return
        if is_other:
            fds.insert(3, source.detach())
        if os.fork() == 0:
            requests.close()
            others.close()
            _start(json.loads(words), fds, ends_with_asker=is_other)
        for fd in fds:
            os.close(fd)


def _start(request: dict[str, Any], fds: list[int], *, ends_with_asker: bool) -> None:
    """Fork the process, wait for it, and say how it ended. Does not return."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        for number, fd in enumerate(fds[:3]):
            os.dup2(fd, number)
        for fd in fds[:4]:
            os.close(fd)
        _run(**request)
    for fd in (*fds[:3], *fds[4:]):
        os.close(fd)
    try:
        os.write(fds[3], f"{pid}\n".encode())
    except OSError:
        os.kill(pid, signal.SIGKILL)  # who asked for it was killed
    has_ended = threading.Event()
    if ends_with_asker:
        threading.Thread(target=_end_with, args=(fds[3], pid, has_ended), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    has_ended.set()
    try:
        os.write(fds[3], f"{code}\n".encode())
    finally:
        os._exit(0)


def _end_with(fd: int, pid: int, has_ended: threading.Event) -> None:
    os.read(fd, 1)
    if not has_ended.is_set():  # else its number may be that of another process by now
        os.kill(pid, signal.SIGKILL)


def _run(words: list[str], cwd: str, env: dict[str, str]) -> None:
    """Be `python WORDS`. Does not return."""
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


def fork_server(requests: socket.socket, others: socket.socket) -> None:
    """A server that is a fork of this process, before tests were imported: it imports nothing twice.

    What pytest and its plugins have put into this process is taken out of the fork.
    """
    if os.fork():
        return
    try:
        faulthandler.disable()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        kept = {requests.fileno(), others.fileno()}
        for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
            if int(name) > 2 and int(name) not in kept:
                try:
                    os.close(int(name))
                except OSError:  # that of the listing
                    continue
        gc.enable()
        _open_streams()
        sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
        threading.excepthook = threading.__excepthook__
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        serve(requests, others)
    finally:
        os._exit(0)


def _open_streams() -> None:
    """As Python opens them when it starts; those of pytest keep what is written."""
    was = sys.__stdout__
    assert was is not None
    sys.stdin = open(0, encoding=was.encoding, errors=was.errors, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=was.encoding, errors=was.errors, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=was.encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for handler in logging.getLogger("transformers").handlers:
        handler.setStream(sys.stderr)  # type: ignore[attr-defined]
        handler.flush = sys.stderr.flush  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path[:0] = json.loads(sys.argv[1])
    import_all()
    serve(*(socket.socket(fileno=int(number)) for number in sys.argv[2:4]))
