"""Memory given back to the system where it is at its end."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

import torch


def give_back() -> None:
    """Let go of what nobody holds any more, and of the free pages between what is held, where the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
