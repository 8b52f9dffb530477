"""Importing the libraries that a verb works with."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Imports without Python's collector of reference cycles, to which what they made stays unknown afterwards.

    Modules are there until the process ends. By itself it would look through them some hundred times while they come,
    a seventh of the time, and again and again afterwards.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if is_on:
            gc.enable()
