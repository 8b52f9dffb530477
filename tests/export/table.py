"""The table of docs/export.md: what was exported of each architecture, and how near it is to what was tuned.

PYTHONPATH=src:tests python tests/export/table.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from export.exports import of_architecture
from tunesmith.export import probe, verify
from tunesmith.export.exporting import export_run
from tunesmith.export.gguf_models import ARCHITECTURES
from tunesmith.export.options import Options

TARGETS = {
    "merged float32": ("merged", Options()),
    "merged bfloat16": ("merged", Options(dtype="bfloat16")),
    "gguf f16": ("gguf", Options(quant="f16")),
    "gguf q8_0": ("gguf", Options(quant="q8_0")),
}


def main() -> None:
    logging.disable_progress_bar()
    verify.launch = probe.do_job
    print(f"| | {' | '.join(TARGETS)} |")
    print("|---" * (len(TARGETS) + 1) + "|")
    for arch in ARCHITECTURES:
        cells = []
        for target, options in TARGETS.values():
            with TemporaryDirectory() as folder:
                done = export_run(
                    of_architecture(arch), target, out=Path(folder) / "out", options=options, offline=True
                )
            assert done.found is not None
            cells.append(f"{done.found.kl:.0e}, {done.found.top1:.0%}")
        print(f"| {arch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
