"""`make bench-quick`: one epoch of the example chats with LoRA on this machine, as one line of a table."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ("train.epochs=1", "evaluation.samples=0", "evaluation.max_rows=16")


def main() -> int:
    words = [sys.executable, "scripts/get_model.py", "smollm2"]
    fetched = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if fetched.returncode:
        return fetched.returncode
    model = fetched.stdout.strip().splitlines()[-1]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        words = ["train", model, "examples/data/chat.jsonl", "--eval", "examples/data/chat-held-out.jsonl"]
        words += ["--method", "lora", "--out", str(run), *sys.argv[1:]]
        for setting in SETTINGS:
            words += ["--set", setting]
        code = subprocess.run([sys.executable, "-m", "tunesmith", *words], cwd=ROOT, check=False).returncode
        if code:
            return code
        report = json.loads((run / "report.json").read_text("utf-8"))
    print(
        "\n| machine | precision | rows | tokens | seconds | tokens/s | peak GiB |\n|---|---|---:|---:|---:|---:|---:|"
    )
    print(
        f"| {platform.machine()}, {report['threads']} threads | {report['precision']} | {report['rows']['train']:,} "
        f"| {report['tokens']['processed']:,} | {report['seconds']['train']:.1f} | {report['tokens_per_second']:.0f} "
        f"| {report['peak_memory_bytes'] / 2**30:.2f} |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
