"""Faults of disk and machine, at the n-th call that touches a file: an errno, or the end of the process."""

import builtins
import errno
import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate")
"""Functions of `os` that change what is on disk, or get ready to."""


class Faults(AbstractContextManager["Faults"]):
    """Counts the calls inside the block and fails at number `at`; a failing write has written half.

    `code` None kills the process as SIGKILL does. `at` 0 only counts. `paths`: what pathlib opens counts too.
    """

    def __init__(
        self, at: int = 0, code: int | None = errno.ENOSPC, *, from_there_on: bool = False, paths: bool = False
    ) -> None:
        self.at, self.code, self.from_there_on, self.paths = at, code, from_there_on, paths
        self.num_calls = 0
        self.failed: str | None = None
        self._patches = ExitStack()

    def __enter__(self):
        for name in CALLS:
            self._patches.enter_context(mock.patch.object(os, name, self._guarded(name, getattr(os, name))))
        opened = self._opened(builtins.open)
        for module in (builtins, *([io] if self.paths else [])):
            self._patches.enter_context(mock.patch.object(module, "open", opened))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def call(self, name: str, half: Callable[[], Any] = lambda: None) -> None:
        self.num_calls += 1
        if self.num_calls == self.at or (self.from_there_on and self.failed):
            half()
            self.failed = name
            if self.code is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.code, os.strerror(self.code or 0))

    def _guarded(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            half = (lambda: real(arguments[0], arguments[1][: len(arguments[1]) // 2])) if name == "write" else None
            self.call(name, half or (lambda: None))
            return real(*arguments, **options)

        return guarded

    def _opened(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+"):
                return real(path, mode, *arguments, **options)
            self.call("open")
            return _Written(real(path, mode, *arguments, **options), self)

        return opened


class _Written:
    """A file that is open for writing."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write(self, content: Any) -> int:
        def half() -> None:
            whole = content if isinstance(content, str) else bytes(content)
            self._file.write(whole[: len(whole) // 2])
            self._file.flush()

        self._faults.call("write", half)
        return int(self._file.write(content))

    def truncate(self, size: int | None = None) -> int:
        self._faults.call("ftruncate")
        return int(self._file.truncate(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._file.__exit__(*exception)


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a fork and return how it ended: 0, or minus the signal. Its errors end it with 1."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@contextmanager
def limited_files(num_bytes: int) -> Iterator[None]:
    """No file that this process writes, or one that it starts, gets larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
