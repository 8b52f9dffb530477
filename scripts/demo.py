"""`make demo`: get a model, tune it on real chats, and ask it one thing before and after."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What can you eat?"


def main() -> int:
    begun = time.monotonic()
    words = [sys.executable, "scripts/get_model.py", "smollm2"]
    fetched = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if fetched.returncode:
        return fetched.returncode
    model = shown(Path(fetched.stdout.strip().splitlines()[-1]))
    run = free_name()
    train = ["train", model, "examples/data/chat.jsonl", "--eval", "examples/data/chat-held-out.jsonl"]
    for words in (
        [*train, "--method", "lora", "--out", run],
        ["chat", run, "--compare", "--max-tokens", "60", "--once", QUESTION],
    ):
        print(f"\n$ tunesmith {shlex.join(words)}\n", flush=True)
        code = subprocess.run([sys.executable, "-m", "tunesmith", *words], cwd=ROOT, check=False).returncode
        if code:
            return code
    minutes = (time.monotonic() - begun) / 60
    print(f"\nThat took {minutes:.1f} minutes. Now yours:\n")
    print(f"  .venv/bin/tunesmith chat {run} --compare\n  .venv/bin/tunesmith train {model} YOUR_ROWS.jsonl\n")
    return 0


def shown(path: Path) -> str:
    """Relative where it can be: a command that fits on a line and can be typed."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def free_name() -> str:
    """runs/demo, or the first runs/demo-N that is not there yet."""
    number = 1
    while (ROOT / (name := f"runs/demo{f'-{number}' if number > 1 else ''}")).exists():
        number += 1
    return name


if __name__ == "__main__":
    sys.exit(main())
