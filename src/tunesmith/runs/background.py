"""One call in a thread of its own: hashing and writing release Python's lock, so that the caller works on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` at once in a daemon thread: a process that ends earlier does not wait for it, as it would
    for the threads of an executor. `work` must change nothing that its caller uses before `result`."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as failure:  # a thread's outermost frame: `result` raises it
            future.set_exception(failure)

    threading.Thread(target=run, daemon=True).start()
    return future
