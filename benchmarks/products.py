"""`python -m benchmarks.products`: the share of a training step that its matrix products take, each timed by itself.

The first step of a real run is made again and again. Once every matrix product in it is counted by operation, shapes,
strides and types; each is then timed alone on random numbers that lie as its own did, and the sum of count × seconds is
divided by the median time of steps that nobody looked into. A profiler would make the small operations longer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measured import machine, run_child, versions
from benchmarks.table import place
from tunesmith.environment import in_force, others_running, prepare_environment

PEER = "benchmarks.peers.products_peer"
LIMIT = "ONEDNN_MAX_CPU_ISA"
INSTRUCTIONS = (
    "DEFAULT",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
    "AVX512_CORE_BF16",
    "AVX512_CORE_FP16",
    "AVX512_CORE_AMX",
)
"""What oneDNN may be limited to. It says nothing of a name that it does not know, and then limits nothing."""
COLUMNS = (
    "method",
    "instructions",
    "precision",
    "threads",
    "tokens",
    "step, ms",
    "products",
    "alone, ms",
    "share of the step",
    "GFLOP/s",
)

NAMES = ("model", "train", "rows_per_step", "task", "set", "steps", "operations")
"""Options that a case is given."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table, in a process of its own."""

    method: str
    instructions: str


def measure(case: Case, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What products_peer.py tells, or why it failed."""
    spec, out = folder / "spec.json", folder / "out.json"
    spec.write_text(json.dumps({**settings, "method": case.method, "folder": str(folder / "runs")}), "utf-8")
    out.unlink(missing_ok=True)
    words = [sys.executable, "-m", PEER, str(spec), str(out)]
    child = run_child(words, log=folder / "log", settings={LIMIT: case.instructions})
    return {"error": child.tail} if child.code else json.loads(out.read_text("utf-8"))


def line(case: Case, found: dict[str, Any]) -> str:
    """Of the table. The step's median, and between brackets its fastest and slowest."""
    if "error" in found:
        return f"| {case.method} | {case.instructions} | failed: {found['error'].splitlines()[-1]} |{' |' * 7}"
    step, alone = statistics.median(found["seconds"]), found["products_seconds"]
    fastest, slowest = min(found["seconds"]), max(found["seconds"])
    cells = (
        *(case.method, case.instructions, found["precision"], found["threads"], found["tokens"]),
        f"{step * 1e3:,.1f} ({fastest * 1e3:,.1f}–{slowest * 1e3:,.1f})",
        f"{found['num_products']:,}",
        f"{alone * 1e3:,.1f}",
        f"{alone / step:.0%}",
        f"{found['flops'] / alone / 1e9:,.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


def operations(case: Case, found: dict[str, Any]) -> str:
    """A table of the longest, as torch's profiler has them, which makes small ones longer; "" where none are told."""
    told = found.get("operations", [])
    lines = [f"| {name} | {seconds * 1e3:,.1f} | {calls:,.0f} |" for name, seconds, calls in told]
    head = ["", f"{case.method}, {case.instructions}:", "", "| operation | ms a step | calls |", "|---|---:|---:|"]
    return "\n".join([*head, *lines, ""]) if told else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="a folder, a hub id or a .gguf file")
    add("--train", required=True, metavar="FILE", help="rows")
    add("--method", nargs="+", default=["lora", "full"], help="one line of the table each")
    add("--rows-per-step", type=int, default=16)
    add("--task", help="of the rows, where they do not say")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any other option of a recipe")
    add("--steps", type=int, default=6, help="timed before the products are, and as many after them")
    add("--operations", type=int, default=0, help="so many of each case, the longest first, by torch's profiler")
    add(
        "--isa",
        nargs="+",
        choices=INSTRUCTIONS,
        default=[os.environ.get(LIMIT, INSTRUCTIONS[0])],
        help=f"instructions that oneDNN may use at most ({LIMIT}): a processor with faster products shows what one "
        "without them does; one line of the table each",
    )
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """0: every case ran; 1: one failed."""
    options = _parser().parse_args(words)
    prepare_environment(os.environ, others_running)  # as the command line does for its runs
    here = machine()
    print(f"{here['processor']}, {here['cores']} cores; {_listed(versions())}  ")
    print(f"{_listed(in_force(os.environ))}  ")
    rows = f"{options.rows_per_step} rows a step"
    print(", ".join([place(options.model), place(options.train), rows, *options.set]) + "\n")
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|---|{'---:|' * (len(COLUMNS) - 3)}", flush=True)
    settings = {name: getattr(options, name) for name in NAMES}
    has_failed, tables = False, ""
    with tempfile.TemporaryDirectory() as folder:
        for case in (Case(method, isa) for method in options.method for isa in options.isa):
            found = measure(case, settings, Path(folder))
            has_failed |= "error" in found
            print(line(case, found), flush=True)
            tables += operations(case, found)
    print(tables, end="")
    return int(has_failed)


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
