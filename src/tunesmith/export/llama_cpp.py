"""llama.cpp's quantizer through llama-cpp-python, which alone makes K types.

    python -m tunesmith.export.llama_cpp SOURCE OUT FILE_TYPE THREADS

quantizes the GGUF file SOURCE into OUT: in its own process, since a failing quantizer ends it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from errno import ENOSPC
from importlib.util import find_spec
from pathlib import Path

from tunesmith.environment.children import for_child, python_words
from tunesmith.errors import ExportError

TIMEOUT_S = 3600.0
TICK_S = 0.5
_LOG_ERROR = 4
"""ggml's number of this log level."""


def is_installed() -> bool:
    return find_spec("llama_cpp") is not None


def run_module(
    module: str, *words: str, what: str, tick: Callable[[], None] = lambda: None, limit_s: float = TIMEOUT_S
) -> None:
    """Run a module of the package in a new process, offline; `tick` is called twice a second meanwhile.

    Raises ExportError with its last line of stderr, after `what`.
    """
    command, ends = [*python_words(module), *words], time.monotonic() + limit_s
    with subprocess.Popen(
        command, env=for_child(HF_HUB_OFFLINE="1"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        errors="replace",
    ) as child:  # fmt: skip
        try:
            errors = None
            while errors is None:
                try:
                    errors = child.communicate(timeout=TICK_S)[1]
                except subprocess.TimeoutExpired:
                    tick()
                    if time.monotonic() > ends:
                        raise ExportError(f"{what}: not done within {limit_s / 60:.0f} minutes.") from None
        finally:
            child.kill()  # after an error or Ctrl-C here; one that has ended is left alone
    if child.returncode != 0:
        last = [line for line in errors.splitlines() if line.strip()][-1:] or [f"exit code {child.returncode}"]
        raise ExportError(f"{what}: {last[0][:600]}")


def requantize(source: Path, out: Path, *, file_type: int, threads: int, tick: Callable[[], None]) -> None:
    """Write the GGUF `source` as `out` with matrices of llama.cpp's `file_type`; `tick`: see `run_module`.

    Raises ExportError with the quantizer's own message; OSError if the disk is full.
    """
    words = (str(source), str(out), str(file_type), str(threads))
    try:
        run_module("tunesmith.export.llama_cpp", *words, what="llama.cpp's quantizer failed", tick=tick)
    except ExportError as error:
        written = out.stat().st_size if out.exists() else 0
        # The quantizer says only that writing failed. Its output is at most as large as its input.
        if shutil.disk_usage(out.parent).free < source.stat().st_size - written:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(out)) from error
        raise


def _quantize(source: str, out: str, file_type: str, threads: str) -> None:
    import llama_cpp

    errors: list[str] = []

    def keep(level: int, text: bytes, data: object) -> None:
        if level == _LOG_ERROR:
            errors.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, None)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = int(file_type), int(threads)
    if code := llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), settings):
        sys.exit("; ".join(errors) or f"it stopped with code {code}")


if __name__ == "__main__":
    _quantize(*sys.argv[1:])
