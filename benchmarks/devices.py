"""One run as two processes of one thread each, and as one process of two threads: tokens a second, side by side."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.environment.children import for_child

WARM_UP = 3
"""First steps that do not count."""
BAR = 0.9
"""Least share of the speed of one process."""
WAYS = {"1 process of 2 threads": (1, 2), "2 processes of 1 thread": (2, 1)}


def add_devices(verbs: Any) -> None:
    devices = verbs.add_parser(
        "devices",
        help="tokens a second of two processes of one thread, beside one process of two",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = devices.add_argument
    add("--model", required=True, help="a folder of a chat model, or a .gguf file")
    add("--train", required=True, help="chats, JSONL")
    add("--rounds", type=int, default=3, help="turns of each way, taken alternately")
    add("--steps", type=int, default=20)
    add("--rows-per-step", type=int, default=16)
    devices.set_defaults(run=_devices)


def _devices(options: argparse.Namespace, words: Sequence[str]) -> int:
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way, (devices, threads) in WAYS.items():
                out = Path(folder) / f"{number}-{devices}"
                found[way].append(_turn(options, out, devices, threads))
                print(f"round {number + 1}: {way}: {found[way][-1]:,.0f} tokens/s", flush=True)
    one, two = (statistics.median(speeds) for speeds in found.values())
    rounds = ", ".join(f"{b / a:.3f}" for a, b in zip(*found.values(), strict=True))
    print(
        f"two processes: {two / one:.3f} of one process's tokens/s (round by round {rounds}); at least {BAR} is wanted"
    )
    return 0 if two / one >= BAR else 1


def _turn(options: argparse.Namespace, out: Path, devices: int, threads: int) -> float:
    """Tokens a second of the steps after the first ones."""
    settings = {
        "devices": devices, "threads": threads, "train.max_steps": options.steps, "evaluation.samples": 0,
        "evaluation.general": "false", "evaluation.surprising": 0, "evaluation.max_rows": 8, "method": "lora",
        "train.rows_per_step": options.rows_per_step,
    }  # fmt: skip
    chosen = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    words = [
        "train",
        options.model,
        options.train,
        "--out",
        str(out),
        "--runs",
        str(out.parent),
        "--offline",
        "--quiet",
    ]
    environment = {key: value for key, value in for_child().items() if key != "OMP_NUM_THREADS"}
    environment.setdefault("GOMP_SPINCOUNT", "300000")  # libgomp's own default, for both
    command = [sys.executable, "-m", "tunesmith", *words, *chosen]
    subprocess.run(command, check=True, env=environment)
    events = map(json.loads, (out / "events.jsonl").read_text("utf-8").splitlines())
    steps = [event for event in events if event["kind"] == "step"][WARM_UP:]
    return sum(step["values"]["tokens"] for step in steps) / sum(step["timing"]["seconds"] for step in steps)
