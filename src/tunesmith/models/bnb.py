"""bitsandbytes, imported in one place: at import it looks for compiled code on the hub, which nobody asked for."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any


def import_bitsandbytes() -> Any:
    """The package. Call before anything else may import it, as peft and transformers do.

    Where the package `kernels` is installed, bitsandbytes downloads a kernel for CPUs and runs it; inside this import
    there is no such package, and bitsandbytes takes the code that it came with.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    there, before = "kernels" in sys.modules, sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if there and before is not None:
            sys.modules["kernels"] = before
