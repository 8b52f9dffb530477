"""`python -m benchmarks whole`: the time that a plan foresees for a whole run, beside the run.

Two commands as a person types them, one after the other: `tunesmith plan ... --json`, which also encodes the rows, and
`tunesmith train ...` of the same words, from its start to its end, report included. What the run took part by part is
told by its log. With --results many commands make one table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import environment, machine, run_child, versions
from benchmarks.table import place

PARTS = {
    "starting": (("starting",), ("start", "resume")),
    "training": (("training",), ("step",)),
    "measured rows": (("measuring",), ("evaluation", "general")),
    "answers": (("answering",), ("sample", "answers")),
    "checkpoints": (("saving",), ("plan", "checkpoint")),
    "the end": (("finishing",), ("end",)),
}
"""Part of a run → kinds of work of its forecast, and events that end it."""


def add_whole(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("whole", help="the time that a plan foresees for a whole run, beside the run")
    parser.add_argument("--results", type=Path, help="JSON lines, one a run: put this one there, and show all")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the run there")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="words of tunesmith train, behind --")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: it ran to its end; 1: it did not."""
    asked = [word for word in options.train if word != "--"]
    found = measure(asked, options.keep) if asked else None
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


def measure(asked: Sequence[str], keep: Path | None = None) -> dict[str, Any]:
    """Seconds foreseen by formula and after the probe, and taken; or why there are none.

    `keep`: where the run stays.
    """
    command = shlex.join(["tunesmith", "train", *map(place, asked)])
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        tunesmith = [sys.executable, "-m", "tunesmith"]
        plan = subprocess.run(
            [*tunesmith, "plan", *asked, "--runs", str(folder), "--json"],
            capture_output=True, text=True, env=environment(), check=False,
        )  # fmt: skip
        if plan.returncode:
            return {"command": command, "error": plan.stderr[-2000:]}
        values = json.loads(plan.stdout.splitlines()[-1])
        begun = time.time()
        child = run_child([*tunesmith, "train", *asked, "--runs", str(folder), "--quiet"], log=folder / "log")
        if child.code:
            return {"command": command, "error": child.tail}
        newest = max(folder.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        log = newest.read_text("utf-8").splitlines()
        taken = taken_by_part([json.loads(line) for line in log], begun, begun + child.wall_seconds)
    by_formula, after_probe = values["forecast"]["seconds"], values["probe"]["seconds"]
    return {
        "command": command,
        "by_formula": by_formula["total"],
        "after_probe": after_probe["total"],
        "measured": child.wall_seconds,
        "parts": {part: [taken[part], foreseen(by_formula, part), foreseen(after_probe, part)] for part in PARTS},
        "load_before": child.load_before,
    }


def foreseen(seconds: dict[str, Any], part: str) -> float:
    """Of a forecast, for one part of the run."""
    return sum(seconds["work"][kind]["seconds"] for kind in PARTS[part][0])


def taken_by_part(events: Sequence[dict[str, Any]], begun: float, ended: float) -> dict[str, float]:
    """What a run took, by its log: what comes before an event is the event's. All of it is some part's."""
    part_of = {kind: part for part, (_, kinds) in PARTS.items() for kind in kinds}
    taken = dict.fromkeys(PARTS, 0.0)
    last, part = begun, "starting"
    for event in events:
        part = part_of.get(event["kind"], part)
        taken[part] += event["time"] - last
        last = event["time"]
    taken["the end"] += ended - last
    return taken


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
    lines += [
        "",
        "Of these, part by part:",
        "",
        "| run | part | measured | by formula | after a probe |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| `{one['command']}` | {part} | {' | '.join(f'{seconds:.1f}' for seconds in three)} |"
        for one in found
        for part, three in one.get("parts", {}).items()
    ]
    lines.append("")
    whole = [one for one in found if "error" not in one]
    for way, name in (("by_formula", "By formula"), ("after_probe", "After a probe")):
        if off := [abs(one[way] / one["measured"] - 1) for one in whole]:
            lines.append(f"{name}, {len(off)} runs: median error {statistics.median(off):.0%}, worst {max(off):.0%}.  ")
    return "\n".join(lines) + "\n"
