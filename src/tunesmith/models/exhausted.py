"""Whether an error says that memory is at its end, whoever says so."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import torch

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "failed to allocate")
"""What torch's allocators write in a RuntimeError: DefaultCPUAllocator, oneDNN and others have no class for it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Of torch on any device, or of Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def give_back() -> None:
    """Let go of what nobody holds any more, and of the free pages between what is held, where the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
