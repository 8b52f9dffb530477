"""Packages that may be missing: the command that installs them, and the import of bitsandbytes."""

from __future__ import annotations

import importlib
import logging
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

_NEEDED_BY = re.compile(r"(?P<package>[^;]+?)\s*;\s*extra\s*==\s*[\"'](?P<extra>[^\"']+)[\"']")


def install_command(*extras: str) -> str:
    """The command that installs the packages of extras of tunesmith into the Python that runs.

    It names the packages and not `tunesmith[extra]`, which an index would have to know: tunesmith is installed
    from a checkout.
    """
    python = shlex.quote(sys.executable or "python")
    try:
        requirements = [_NEEDED_BY.fullmatch(text) for text in requires("tunesmith") or ()]
    except PackageNotFoundError:  # its source runs without being installed
        requirements = []
    packages = [match["package"] for match in requirements if match and match["extra"] in extras]
    packages = packages or [f".[{','.join(extras)}]"]
    return f"{python} -m pip install {' '.join(map(shlex.quote, packages))}"


def import_bitsandbytes() -> Any:
    """Import bitsandbytes without network; to be called before peft or transformers import it.

    Where the package `kernels` is installed, bitsandbytes downloads a kernel for CPUs and runs it at import. It
    is hidden here.
    """
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    was_loaded, before = "kernels" in sys.modules, sys.modules.get("kernels")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if was_loaded and before is not None:
            sys.modules["kernels"] = before
