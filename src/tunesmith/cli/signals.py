"""Ctrl-C and SIGTERM: the first stops after a checkpoint, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
_LOST = "stopping: a SIGTERM came, or another process of this run was lost."


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def leave_at_once() -> None:
    """Until `interruptible`, Ctrl-C ends the process without a word: nothing is lost during imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as in any program."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stopping_on_signals(
    *,
    has_begun: Callable[[], bool],
    say: Callable[[str], None],
    words: str = "stopping: a checkpoint is written after this step. Once more to leave at once.",
    at_once: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], bool]]:
    """Yields a function that is true once a signal wants a stop.

    Before the run has begun there is nothing to keep, and the first signal interrupts it like any
    program. The first one after that says `words`. A second signal calls `at_once`, to put the
    terminal right, and ends the process.
    """
    requested = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            at_once()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif has_begun():
            from tunesmith.parallel.world import OWN_AGENT  # ranks have it; imported above, it would come first

            requested.set()
            text = _LOST if number == signal.SIGTERM and OWN_AGENT in os.environ else words
            try:
                say(text)
            except RuntimeError:  # the signal came while a line was being written: streams are not reentrant
                os.write(2, f"{text}\n".encode())
        else:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # only the main thread may take signals: another thread has other ways to stop
        return
    earlier = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield requested.is_set
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
