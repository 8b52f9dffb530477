"""llama.cpp's quantizer as a process, because it ends the process when it fails. It imports no torch.

    python -m tunesmith.export.quantizer SOURCE OUT FILE_TYPE THREADS

quantizes the GGUF file SOURCE into OUT.
"""

from __future__ import annotations

import os
import sys

_LOG_ERROR = 4
"""ggml's number of this log level."""


def main(source: str, out: str, file_type: str, threads: str) -> None:
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
    main(*sys.argv[1:])
