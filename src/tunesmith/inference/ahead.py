"""Asks made ready beside the steps of a batch: a megabyte of prompt takes a tokenizer seconds, a schema its compiler,
and answers that are being written wait for neither."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from tunesmith.asking import Refused
from tunesmith.inference.batch import Batch, Job

Ready = tuple[Batch, Job]
"""A job, and the batch that it is for."""
Made = tuple[int, Ready | Refused]
"""What became of an ask, by its key."""


class Ahead:
    """A thread that makes a job of each ask, in the order in which they come.

    `make` makes a job of a message or raises Refused; `on_made` is told on the thread. An ask that is cancelled before
    it is made is never told of.
    """

    def __init__(self, make: Callable[[Mapping[str, Any]], Ready], on_made: Callable[[Made], None]) -> None:
        self._make = make
        self._on_made = on_made
        self._todo: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._open: set[int] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._open.add(message["key"])
        self._todo.put(message)

    def cancel(self, key: int) -> bool:
        """Whether the ask was still to be made, so that nothing is left of it to cancel."""
        with self._lock:
            is_open = key in self._open
            self._open.discard(key)
        return is_open

    def _work(self) -> None:
        while True:
            message = self._todo.get()
            key = message["key"]
            if key not in self._open:
                continue
            made = self._made(message)
            with self._lock:
                if key in self._open:
                    self._open.discard(key)
                    self._on_made((key, made))

    def _made(self, message: Mapping[str, Any]) -> Ready | Refused:
        try:
            return self._make(message)
        except Refused as refusal:
            return refusal
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # an ask of another shape than it should
            return Refused(f"the request cannot be read: {error}", status=400, code="invalid_value")
