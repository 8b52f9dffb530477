"""Memory of this process and of the device that it computes on: the most that was held, what is free, and giving
it back."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

NAMED_GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Linux's control groups, and which of them this process is in."""


def peak_memory_bytes(device: str) -> int:
    """Most memory held so far: on a CUDA device by tensors, elsewhere by this process: on Linux its own, since
    what getrusage says of a child begins with its parent's peak."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if (status := Path("/proc/self/status")).exists() and (most := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
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


def free_on_processor() -> int:
    """Bytes that this process can still get: of the machine's memory, and of what its container is allowed."""
    return min(_memory_free(), _group_free())


def _memory_free() -> int:
    """Bytes that the system can give without swapping."""
    return int(psutil.virtual_memory().available)


def _group_free() -> int:
    """Bytes that the control groups of this process leave (a container, a job of Slurm or systemd), one inside
    the other; cached files can be given up."""
    free, group = 2**63, NAMED_GROUPS
    with suppress(OSError):
        group /= "".join(re.findall(r"^0::/(.*)", OWN_GROUP.read_text("utf-8"), re.M))
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # no such limit, or "max"
            most, now = (int((folder / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
            free = min(free, most - now + int(stat.get("inactive_file", 0)))
    return free
