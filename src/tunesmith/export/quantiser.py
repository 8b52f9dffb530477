"""llama.cpp's own quantiser, through llama-cpp-python: it alone makes the K kinds.

    python -m tunesmith.export.quantiser SOURCE OUT FILE_TYPE THREADS

writes the GGUF file SOURCE anew as OUT. In a process of its own: where it cannot go on it ends the process it is in.
"""

from __future__ import annotations

import os
import shutil
import sys
from errno import ENOSPC
from pathlib import Path

from tunesmith.errors import ExportError
from tunesmith.export.process import in_new_process

_ERROR = 4
"""ggml's number of this level of its log."""


def requantize(source: Path, out: Path, *, file_type: int, threads: int) -> None:
    """Write the GGUF `source` anew, its matrices as llama.cpp's `file_type` says.

    Raises ExportError where the quantiser fails, with its own words; OSError where that is for want of room.
    """
    words = (str(source), str(out), str(file_type), str(threads))
    try:
        in_new_process("tunesmith.export.quantiser", *words, what="llama.cpp's quantiser failed")
    except ExportError as error:
        written = out.stat().st_size if out.exists() else 0
        # It says no more than that writing failed. The source is at least as large as what comes of it.
        if shutil.disk_usage(out.parent).free < source.stat().st_size - written:
            raise OSError(ENOSPC, os.strerror(ENOSPC), str(out)) from error
        raise


def main(source: str, out: str, file_type: str, threads: str) -> None:
    import llama_cpp

    said: list[str] = []

    def keep(level: int, text: bytes, data: object) -> None:
        if level == _ERROR:
            said.append(text.decode(errors="replace").strip())

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, None)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = int(file_type), int(threads)
    if code := llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), how):
        sys.exit("; ".join(said) or f"it gave up with code {code}")


if __name__ == "__main__":
    main(*sys.argv[1:])
