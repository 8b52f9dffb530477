"""Memory of this process and of the device that it computes on: the most that was held, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: on a CUDA device by tensors, elsewhere by this process: on Linux its own, since
    what getrusage says of a child begins with its parent's peak."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists() and (most := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return int(most[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) * (1 if sys.platform == "darwin" else 1024)


def free_cached_memory() -> None:
    """Give freed memory back to the system: objects in circles, free pages of glibc's heap, a GPU's cache."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    if torch.backends.mps.is_available():  # whose allocator torch.accelerator does not know in every version
        torch.mps.empty_cache()
    elif torch.accelerator.is_available():
        with suppress(RuntimeError):  # a card that failed: whoever computes with it says so
            torch.accelerator.memory.empty_cache()
