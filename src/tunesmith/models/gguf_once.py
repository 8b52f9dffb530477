"""Reading a GGUF file once where transformers asks for it again and again.

transformers has the gguf package read the file for the config and once more for the weights, and make the table of
llama.cpp's names anew for every module of the model: five sixths of the time that loading took.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

NAMES = ("GGUFReader", "get_tensor_name_map")
"""Of the gguf package, asked for whenever transformers calls them."""

_INSIDE = threading.RLock()
"""Of the thread that is inside a block, and may enter another."""


@contextmanager
def read_once() -> Iterator[None]:
    """Inside the block what these names give is kept, and given again for the same file, or the same architecture.

    Nothing else is other than without: a name that a version of the package lacks is left out, and what the package's
    own reader finds is what is found. Outside the block nothing is kept. One thread is inside at a time: the package
    is everyone's, and one that left while another is inside would leave that one's names there for good.
    """
    import gguf

    with _INSIDE:
        yield from _replaced(gguf)


def _replaced(gguf: Any) -> Iterator[None]:
    own = {name: getattr(gguf, name) for name in NAMES if hasattr(gguf, name)}
    kept = {name: cache(_fast_reader(found) if name == "GGUFReader" else found) for name, found in own.items()}
    for name, found in kept.items():
        setattr(gguf, name, found)
    try:
        yield
    finally:
        for name, found in own.items():
            setattr(gguf, name, found)


def _fast_reader(reader: Any) -> Any:
    """The same reader over a plain array: a vocabulary takes half a million slices, and each of a mapped file's array
    (numpy.memmap) costs three times as much."""
    if not isinstance(reader, type):  # inside another block
        return reader
    import numpy as np

    class FastReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray) if isinstance(mapped, np.memmap) else mapped

    return FastReader
