"""What the scripts of training peers share, with nothing but the standard library: a peer's own environment runs them.

JOB.json: the fields of `benchmarks.train.Settings`, "seed", "folder" for what is saved, "rows" as peers/render_rows.py
writes them, and "arguments": whatever else the peer is told. RESULT.json: the fields of `benchmarks.train.Log`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

NOT_A_TARGET = -100
"""The label that torch, and with it every peer, leaves out of the loss."""


def labelled(path: str, side: str) -> list[dict[str, list[int]]]:
    """Rows of one side of rows.json, by the names that peers have for them."""
    rows = json.loads(Path(path).read_text("utf-8"))[side]
    return [
        {
            "input_ids": row["ids"],
            "labels": [
                token if is_target else NOT_A_TARGET
                for token, is_target in zip(row["ids"], row["trained"], strict=True)
            ],
        }
        for row in rows
    ]


class Counter:
    """A collator that notes the real tokens and the targets of each batch; batches are taken in the order of steps."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator
        self.batches: list[tuple[int, int]] = []

    def __call__(self, examples: Sequence[Any]) -> Any:
        # The first token is never a target: nothing is before it.
        targets = sum(sum(int(label) != NOT_A_TARGET for label in row["labels"][1:]) for row in examples)
        self.batches.append((sum(len(row["input_ids"]) for row in examples), targets))
        return self.collator(examples)

    def per_step(self, batches: int, steps: int) -> dict[str, list[int]]:
        """Of each step, which takes so many batches."""
        groups = [self.batches[step * batches : (step + 1) * batches] for step in range(steps)]
        return {
            name: [sum(batch[place] for batch in group) for group in groups]
            for place, name in enumerate(("tokens", "targets"))
        }


def versions(*names: str) -> dict[str, str]:
    """Of libraries, without which build it is."""
    return {name: version(name).partition("+")[0] for name in names}


def run(train: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """`python SCRIPT JOB.json RESULT.json`."""
    job, result = map(Path, sys.argv[1:3])
    result.write_text(json.dumps(train(json.loads(job.read_text("utf-8")))), "utf-8")
