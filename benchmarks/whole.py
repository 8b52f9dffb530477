"""`python -m benchmarks whole`: the time that a plan foresees for a whole run, beside the run.

Two commands as a person types them, one after the other: `tunesmith plan ... --json`, which also encodes the rows, and
`tunesmith train ...` of the same words, from its start to its end, report included. With --results many commands make
one table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import environment, machine, run_child, versions
from benchmarks.table import place

PARTS = ("training", "looking", "answering", "saving", "starting")


def add_whole(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("whole", help="the time that a plan foresees for a whole run, beside the run")
    parser.add_argument("--results", type=Path, help="JSON lines, one a run: put this one there, and show all")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="words of tunesmith train, behind --")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: it ran to its end; 1: it did not."""
    asked = [word for word in options.train if word != "--"]
    found = measure(asked) if asked else None
    if found and options.results:
        with open(options.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    kept = options.results and options.results.exists()
    lines = options.results.read_text("utf-8").splitlines() if kept else [json.dumps(found)]
    page = markdown([json.loads(line) for line in lines])
    print(page)
    if options.out:
        options.out.write_text(page, "utf-8")
    return int(found is not None and "error" in found)


def measure(asked: Sequence[str]) -> dict[str, Any]:
    """Seconds foreseen by formula and after the probe, and taken; or why there are none."""
    command = shlex.join(["tunesmith", "train", *map(place, asked)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tunesmith = [sys.executable, "-m", "tunesmith"]
        plan = subprocess.run(
            [*tunesmith, "plan", *asked, "--runs", str(folder), "--json"],
            capture_output=True, text=True, env=environment(), check=False,
        )  # fmt: skip
        if plan.returncode:
            return {"command": command, "error": plan.stderr[-2000:]}
        values = json.loads(plan.stdout.splitlines()[-1])
        child = run_child([*tunesmith, "train", *asked, "--runs", str(folder), "--quiet"], log=folder / "log")
        if child.code:
            return {"command": command, "error": child.tail}
    return {
        "command": command,
        "by_formula": total(values["forecast"]["seconds"]),
        "after_probe": total(values["probe"]["seconds"]),
        "measured": child.wall_seconds,
        "load_before": child.load_before,
    }


def total(seconds: dict[str, float]) -> float:
    """What a plan's screen adds up."""
    return sum(seconds[name] for name in PARTS)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The table, and the median and worst error of each prediction."""
    here = machine()
    libraries = ", ".join(f"{name} {value}" for name, value in versions().items() if name in ("torch", "transformers"))
    lines = [
        f"{here['processor']}, {here['cores']} cores; {libraries}. Seconds of the whole command.",
        "",
        "| run | measured | by formula | error | after a probe | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        if "error" in one:
            lines.append(f"| `{one['command']}` | failed: {one['error'].splitlines()[-1]} | | | | |")
            continue
        cells = [f"`{one['command']}`", f"{one['measured']:.0f}"]
        for way in ("by_formula", "after_probe"):
            cells += [f"{one[way]:.0f}", f"{one[way] / one['measured'] - 1:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    whole = [one for one in found if "error" not in one]
    for way, name in (("by_formula", "By formula"), ("after_probe", "After a probe")):
        if off := [abs(one[way] / one["measured"] - 1) for one in whole]:
            lines.append(f"{name}, {len(off)} runs: median error {statistics.median(off):.0%}, worst {max(off):.0%}.  ")
    return "\n".join(lines) + "\n"
