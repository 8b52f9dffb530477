"""One call in a thread of its own: hashing and writing release Python's lock, so the caller works on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundCall(Generic[T]):
    """Start `work` at once in a daemon thread: a process that ends earlier does not wait for it, as it would for
    `concurrent.futures`. `work` must change nothing that its caller uses before `result`."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._results: list[T] = []
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._work())
        except BaseException as failure:  # a thread's outermost frame: `result` raises it
            self._failure = failure

    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> T:
        """Wait for the work; return its result, or raise its error."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._results[0]
