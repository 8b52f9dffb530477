"""Runs of several processes beside those of one: the losses of each step, and the bits after kills of random ranks.

The runs and the kills are those of tests/parallel/test_many.py; here their number is chosen, and the numbers are shown.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.runs.atomic import write_atomic

TESTS = Path(__file__).parents[1] / "tests"


def add_group(verbs: Any) -> None:
    group = verbs.add_parser(
        "group",
        help="twelve short runs on 1, 2 and 4 processes, and a run of two whose ranks are killed at random moments",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = group.add_argument
    add(
        "--sizes",
        type=int,
        nargs="*",
        default=[2, 4],
        help="processes of the twelve runs, beside one; none: no such runs",
    )
    add("--folder", type=Path, help="keeps what the twelve runs found; a second call goes on there")
    add("--kills", type=int, default=50, help="ranks killed; 0: none")
    add("--seed", type=int, default=0, help="of the moments and ranks of kills")
    group.set_defaults(run=_group)


def _group(options: argparse.Namespace, words: Sequence[str]) -> int:
    sys.path.insert(0, str(TESTS))
    many = importlib.import_module("parallel.test_many")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sizes:
            _compare(many, options.folder or folder, options.sizes)
        if options.kills:
            made = many.killed_run(folder, kills=options.kills, seed=options.seed)
            is_same = many.values_of(made.killed.events()) == many.values_of(made.straight.events())
            print(
                f"{made.kills} kills of a random rank of 2: {'the same bits' if is_same else 'OTHER BITS'}", flush=True
            )
            return 0 if is_same else 1
    return 0


def _of_group(many: Any, folder: Path, size: int) -> Any:
    return many.start(folder, "twelve", size=size, limit_s=400)[0]["twelve"]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What an earlier call found, else what `make` finds."""
    if not path.exists():
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(found).encode())
        print(f"{path.stem}: done", file=sys.stderr, flush=True)
    return json.loads(path.read_text("utf-8"))


def _compare(many: Any, folder: Path, sizes: Sequence[int]) -> None:
    """Print the largest difference of a step's loss from that of one process, for each run and number of processes."""
    recipes = kept(folder / many.TWELVE, lambda: many.write_twelve(folder))
    alone = kept(folder / "alone.json", lambda: many.steps_alone(folder, recipes))
    found = {
        size: kept(folder / f"{size}.json", partial(_of_group, many, folder / f"of-{size}", size)) for size in sizes
    }
    print(f"| run | first loss | {' | '.join(f'{size} processes: first step, all steps' for size in sizes)} |")
    print(f"|{'---|' * (2 + len(sizes))}")
    for run, one in alone.items():
        away = [[abs(a - b) for a, b in zip(found[size][run]["losses"], one["losses"], strict=True)] for size in sizes]
        shown = " | ".join(f"{some[0]:.0e}, {max(some):.0e}" for some in away)
        print(f"| {run} | {one['losses'][0]:.3f} | {shown} |", flush=True)
    print(json.dumps({"runs": len(alone), "sizes": list(sizes)}))
