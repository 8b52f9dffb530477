"""Ctrl-C and SIGTERM: the first asks for a good end, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
_interrupted = threading.Event()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


def leave_at_once() -> None:
    """Until `interruptible`, Ctrl-C ends the process without a word: there is nothing to keep while it is imported."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def interruptible() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt, as in any program."""
    forget_interrupt()
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether a KeyboardInterrupt was raised: libraries that are being imported turn it into errors of their own."""
    return _interrupted.is_set()


def forget_interrupt() -> None:
    """It was dealt with, and what fails from here on fails by itself."""
    _interrupted.clear()


@contextmanager
def stopping_on_signals(
    *,
    has_begun: Callable[[], bool],
    say: Callable[[str], None],
    words: str = "stopping: a checkpoint is written after this step. Once more to leave at once.",
    at_once: Callable[[], None] = lambda: None,
) -> Iterator[Callable[[], bool]]:
    """Gives the question "was it asked to stop?".

    Before the run has begun there is nothing to keep, and the first signal interrupts like any other program's. `words`
    are said of the first one.
    `at_once` is called before a second signal ends the process, to put the terminal right.
    """
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            at_once()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif has_begun():
            asked.set()
            say(words)
        else:
            _interrupt(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread may take signals: whoever runs us in another one asks in other ways
        return
    earlier = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
