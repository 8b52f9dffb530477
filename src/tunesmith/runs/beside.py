"""Work in a thread of its own, beside what its caller does meanwhile: hashing and writing leave Python's lock alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """Work that has begun. It must change nothing that its caller touches before `result`."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._made: list[T] = []
        self._failure: BaseException | None = None
        # A process that ends in the meantime does not wait for it.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made.append(self._work())
        except BaseException as failure:  # a thread's outermost frame: `result` raises it
            self._failure = failure

    def result(self) -> T:
        """What the work made, once it is done; raises what it raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._made[0]
