"""`python -m benchmarks whole`: the time that a plan foresees for a whole run, beside the run.

Two commands as a person types them, one after the other: `tunesmith plan ... --json`, which also encodes the rows, and
`tunesmith train ...` of the same words, from its start to its end, report included. What the run took part by part and
phase by phase is told by its log, and how many times its steps the whole command took. With --results many commands
make one table; with --beside another checkout's command runs in turns with it.
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
from benchmarks.reviews import make_reviews
from benchmarks.table import place

PARTS = {
    "starting": (("starting",), ("start", "resume")),
    "training": (("training",), ("step",)),
    "measured rows": (("measuring", "teaching", "grading"), ("evaluation", "general")),
    "answers": (("answering",), ("sample", "answers")),
    "checkpoints": (("saving",), ("plan", "checkpoint")),
    "the end": (("finishing",), ("end",)),
}
"""Part of a run → kinds of work of its forecast, and events that end it."""
STEPS = "steps"
PHASES = {
    "start": "start", "resume": "start", "plan": "start", "step": STEPS, "evaluation": "losses", "sample": "answers",
    "answers": "answers", "general": "general text", "checkpoint": "checkpoints", "end": "result and report",
}  # fmt: skip
"""Event → the phase that it ends; those that measure are told apart by what they are named."""


def add_whole(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("whole", help="the time that a plan foresees for a whole run, beside the run")
    parser.add_argument("--results", type=Path, help="JSON lines, one a run: put this one there, and show all")
    parser.add_argument("--out", type=Path, help="write the table here too")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the run there")
    parser.add_argument(
        "--reviews", type=int, nargs=2, metavar=("TRAIN", "HELD"),
        help="make so many chats with answers of one word, and name them; 0 held out: the command does that",
    )  # fmt: skip
    parser.add_argument("--beside", metavar="PYTHON", help="interpreter of another checkout, whose turn comes first")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each")
    parser.add_argument("--no-plan", action="store_true", help="run it without asking how long it will take")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="words of tunesmith train, behind --")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: they ran to their end; 1: one did not."""
    asked, found = [word for word in options.train if word != "--"], []
    with tempfile.TemporaryDirectory() as temporary:
        if options.reviews:
            asked[1:1] = make_reviews(Path(temporary), *options.reviews)
        for _ in range(options.rounds if asked else 0):
            for python in (options.beside, None) if options.beside else (None,):
                found.append(measure(asked, options.keep, python=python, plans=not options.no_plan))
    if options.results:
        with open(options.results, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in found)
    kept = options.results and options.results.exists()
    lines = [json.loads(line) for line in options.results.read_text("utf-8").splitlines()] if kept else found
    page = markdown(lines)
    print(page)
    if options.out:
        options.out.write_text(page, "utf-8")
    return int(any("error" in one for one in found))


def measure(
    asked: Sequence[str], keep: Path | None = None, *, python: str | None = None, plans: bool = True
) -> dict[str, Any]:
    """Seconds foreseen by formula and after the probe, and taken; or why there are none.

    `keep`: where the run stays. `python`: of another checkout with its own package; None: this one's.
    """
    command = shlex.join(["tunesmith", "train", *map(place, asked)])
    settings = {} if python is None else {"PYTHONPATH": ""}
    facts = {"command": command, "commit": _version(python)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        tunesmith = [python or sys.executable, "-m", "tunesmith"]
        values: dict[str, Any] = {}
        if plans:
            plan = subprocess.run(
                [*tunesmith, "plan", *asked, "--runs", str(folder), "--json"],
                capture_output=True, text=True, env=environment() | settings, check=False,
            )  # fmt: skip
            if plan.returncode:
                return {**facts, "error": plan.stderr[-2000:]}
            values = json.loads(plan.stdout.splitlines()[-1])
        begun = time.time()
        words = [*tunesmith, "train", *asked, "--runs", str(folder), "--quiet"]
        child = run_child(words, log=folder / "log", settings=settings)
        if child.code:
            return {**facts, "error": child.tail}
        newest = max(folder.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime)
        events = [json.loads(line) for line in newest.read_text("utf-8").splitlines()]
        ended = begun + child.wall_seconds
        taken, phases = taken_by_part(events, begun, ended), taken_by_phase(events, begun, ended, newest.parent)
    facts |= {"measured": child.wall_seconds, "phases": phases, "load_before": child.load_before}
    if not plans:
        return facts
    by_formula, after_probe = values["forecast"]["seconds"], values["probe"]["seconds"]
    return {
        **facts,
        "by_formula": by_formula["total"],
        "after_probe": after_probe["total"],
        "spread": after_probe["spread"],
        "parts": {part: [taken[part], foreseen(by_formula, part), foreseen(after_probe, part)] for part in PARTS},
    }


def _version(python: str | None) -> str:
    """The commit of the checkout whose command is run."""
    if python is None:
        return str(versions()["tunesmith"])
    asked = "import tunesmith; print(tunesmith.__file__)"
    words = [python, "-c", asked]
    where = subprocess.run(words, capture_output=True, text=True, check=True, env=environment() | {"PYTHONPATH": ""})
    folder = Path(where.stdout.strip()).parent
    words = ["git", "describe", "--always", "--abbrev=10", "--exclude=*"]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or "no git"


def foreseen(seconds: dict[str, Any], part: str) -> float:
    """Of a forecast, for one part of the run."""
    return sum(seconds["work"].get(kind, {"seconds": 0.0})["seconds"] for kind in PARTS[part][0])


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


def taken_by_phase(events: Sequence[dict[str, Any]], begun: float, ended: float, folder: Path) -> dict[str, float]:
    """What a run took phase by phase, in order: as `taken_by_part`, but before and after apart.

    An evaluation that writes answers on its way says how long that took. Rows of high loss have no event: the file that
    lists them ends theirs.
    """
    taken: dict[str, float] = {}
    last, listed = begun, folder / "evaluation" / "surprising.json"
    for event in events:
        phase, name = PHASES.get(event["kind"]), event["values"].get("name")
        if phase is None:
            continue
        seconds = event["time"] - last
        if phase == "result and report" and listed.exists():
            taken["rows of high loss"] = listed.stat().st_mtime - last
            seconds = event["time"] - listed.stat().st_mtime
        if phase == "losses" and (writing := event["timing"].get("answering")):
            taken[f"answers, {name}"] = writing
            seconds -= writing
        phase = f"{phase}, {name}" if name else phase
        taken[phase] = taken.get(phase, 0.0) + seconds
        last = event["time"]
    return {**taken, "end of the process": ended - last}


def by_phase(found: Sequence[dict[str, Any]]) -> list[str]:
    """A table of the phases of all runs, and the ratio of each command to its steps."""
    whole = [one for one in found if "phases" in one]
    heads = [f"{one['commit']}, turn {1 + i}" for i, one in enumerate(whole)]
    names = dict.fromkeys(name for one in whole for name in one["phases"])
    rows = [[name, *(f"{one['phases'].get(name, 0.0):.1f}" for one in whole)] for name in names]
    rows += [
        ["**whole command**", *(f"**{one['measured']:.1f}**" for one in whole)],
        ["**times its steps**", *(f"**{one['measured'] / one['phases'][STEPS]:.2f}**" for one in whole)],
        ["processes that wanted to run before", *(f"{one['load_before']:.1f}" for one in whole)],
    ]
    return [f"| {' | '.join(row)} |" for row in (["seconds", *heads], ["---", *["---:"] * len(heads)], *rows)]


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The tables, and the median and worst error of each prediction."""
    here = machine()
    libraries = ", ".join(f"{name} {value}" for name, value in versions().items() if name in ("torch", "transformers"))
    lines = [f"{here['processor']}, {here['cores']} cores; {libraries}. Seconds of the whole command.", ""]
    lines += [*by_phase(found), ""] if any("phases" in one for one in found) else []
    found = [one for one in found if "error" in one or "by_formula" in one]
    if not found:
        return "\n".join(lines) + "\n"
    lines += [
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
    if ranges := [abs(one["measured"] / one["after_probe"] - 1) <= one["spread"] for one in whole if "spread" in one]:
        lines.append(f"The range of the plan held the truth in {sum(ranges)} of {len(ranges)} runs.  ")
    return "\n".join(lines) + "\n"
