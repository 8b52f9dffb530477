"""Environment variables that torch and its libraries read at their start."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, MutableMapping

from tunesmith.environment.children import SAFE_PATH

SHAPE_CACHE_SIZE = "192"
HEAP_KEPT_FREE = str(2**30)
"""Bytes of freed memory that glibc keeps at the end of the heap."""
MALLOC = (("MALLOC_MMAP_MAX_", -4, "0"), ("MALLOC_TRIM_THRESHOLD_", -1, HEAP_KEPT_FREE), ("MALLOC_ARENA_MAX", -8, "1"))
"""Variables, parameters of mallopt (malloc.h), values."""
NAMES = (
    "GOMP_SPINCOUNT",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
    "LRU_CACHE_CAPACITY",
    *(name for name, _, _ in MALLOC),
    "PYTORCH_ALLOC_CONF",
)


def prepare_environment(environ: MutableMapping[str, str]) -> None:
    """Set what measurably helps in this process and its children, unless it is set; before torch is imported.

    Measured: docs/inside/EXPERIMENTS.md.
    """
    environ.update(SAFE_PATH)
    # oneDNN and torch's layer above it each keep 1,024 compiled products, more than half a MiB each, one for
    # each shape. Rows have all lengths, so both would fill up; a micro-batch needs 35 to 50.
    environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", SHAPE_CACHE_SIZE)
    environ.setdefault("LRU_CACHE_CAPACITY", SHAPE_CACHE_SIZE)
    # glibc maps large blocks one by one and unmaps them when they are freed, so that the kernel clears the same
    # pages in every step; and memory that one thread frees stays in a heap of its own. One heap that keeps up
    # to a GiB takes 15 % less memory at the peak of a LoRA run. Children read the variables, this process needs
    # mallopt.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for name, parameter, value in MALLOC:
        if name not in environ:
            environ[name] = value
            if mallopt is not None:  # glibc alone has it
                mallopt(parameter, int(value))


def in_force(environ: Mapping[str, str]) -> dict[str, str]:
    """The values of `NAMES`, whoever set them; a library's own default where nothing is set."""
    return {name: environ.get(name, "the library's") for name in NAMES}
