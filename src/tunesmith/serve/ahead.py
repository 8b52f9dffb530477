"""Asks made ready beside the steps of a batch: a megabyte of prompt takes a tokenizer seconds, a schema its compiler,
and answers that are being written wait for neither, and no ask waits for the schema of another."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any

from tunesmith.serve.batch import Batch, Job
from tunesmith.serve.protocol import Refused

Ready = tuple[Batch, Job]
"""A job, and the batch that it is for."""
Made = tuple[int, Ready | Refused]
"""What became of an ask, by its key."""


FAILED = 4
"""Exit code of a child whose thread of asks ended."""


class Ahead:
    """Two threads that make a job of each ask, in the order in which they come: one for asks with a schema, one for all
    others.

    `make` makes a job of a message, which it may give up where the function it is given says that nobody wants it any
    more, or raises Refused. `on_made` is called on the thread, but not for an ask that was cancelled before.
    """

    def __init__(
        self, make: Callable[[Mapping[str, Any], Callable[[], bool]], Ready], on_made: Callable[[Made], None]
    ) -> None:
        self._make = make
        self._on_made = on_made
        self._plain: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._with_schema: SimpleQueue[Mapping[str, Any]] = SimpleQueue()
        self._open: set[int] = set()
        self._lock = threading.Lock()
        for todo in (self._plain, self._with_schema):
            threading.Thread(target=self._work, args=(todo,), daemon=True).start()

    def add(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self._open.add(message["key"])
        has_schema = message["ask"].get("json_schema") is not None
        (self._with_schema if has_schema else self._plain).put(message)

    def cancel(self, key: int) -> bool:
        """Whether the ask was still to be made, so that nothing is left of it to cancel."""
        with self._lock:
            is_open = key in self._open
            self._open.discard(key)
        return is_open

    def _work(self, todo: SimpleQueue[Mapping[str, Any]]) -> None:
        try:
            while True:
                self._do(todo.get())
        except BaseException:  # without this thread no ask is answered: the child ends, and is started again
            traceback.print_exc()
            os._exit(FAILED)

    def _do(self, message: Mapping[str, Any]) -> None:
        key = message["key"]
        if key not in self._open:
            return
        made = self._made(message)
        with self._lock:
            if key in self._open:
                self._open.discard(key)
                self._on_made((key, made))

    def _made(self, message: Mapping[str, Any]) -> Ready | Refused:
        key = message["key"]
        try:
            return self._make(message, lambda: key in self._open)
        except Refused as refusal:
            return refusal
        except (TypeError, ValueError, LookupError, AttributeError) as error:  # an ask of another shape than it should
            return Refused(f"the request cannot be read: {error}", status=400, code="invalid_value")
        except Exception as error:  # whatever one ask runs into must not end the others
            traceback.print_exc()
            return Refused(
                f"the request could not be prepared: {type(error).__name__}", status=500, code="internal_error"
            )
