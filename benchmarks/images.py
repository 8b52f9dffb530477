"""`python -m benchmarks images`: training on rows with images.

`--beside trl`: the losses of the first steps of full tuning, tower and projector too, and SFTTrainer's, on the same
rows in the same order. `--cost`: seconds of each step where the vectors of a frozen tower are kept, and where each pass
computes them anew, in turns, each in a process of its own. `--foreseen`: seconds of a step and of a picture as a plan
foresees them by formula and after its probe, and as they are.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, machine, run_peer, versions

LOSS_WITHIN = 1e-5
KEEPING = ("kept", "anew")


def add_images(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("images", help="rows with images: losses beside TRL's SFTTrainer, and what a step costs")
    add = parser.add_argument
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--beside", choices=["trl"], help="losses step by step")
    way.add_argument("--cost", action="store_true", help="seconds of a step with LoRA, the tower frozen")
    way.add_argument("--foreseen", action="store_true", help="seconds that a plan foresees, beside what it takes")
    add("--model", required=True, nargs="+", metavar="FOLDER", help="folders of models that see")
    add("--rows", type=Path, required=True, help="JSONL of images, prompt and completion; <image> begins each prompt")
    add("--peer", default=str(ROOT / ".peers" / "trl" / "bin" / "python"), help="TRL's Python")
    add("--steps", type=int, default=8)
    add("--rows-per-step", type=int, default=4)
    add("--lr", type=float, default=2e-4, help="constant; at 1e-3 rounding grows to 6e-5 in Gemma 3 by step 8")
    add("--precision", default="float32", help="of what costs or is foreseen; losses are compared in float32")
    add("--method", choices=["lora", "full"], default="lora", help="of what is foreseen; full trains the tower too")
    add("--rounds", type=int, default=1, help="turns of each way in what costs")
    add("--threads", type=int, default=1)
    add("--work", type=Path, required=True, metavar="FOLDER", help="runs and results; what is there is kept")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: every loss agrees, or everything was measured; 1: not so, or someone failed."""
    job = {key: value for key, value in vars(options).items() if isinstance(value, str | int | float)}
    job |= {"rows": str(options.rows.resolve())}
    done = []
    for number, model in enumerate(options.model):
        folder = options.work.resolve() / f"{number}-{Path(model).name}"
        folder.mkdir(parents=True, exist_ok=True)
        of_model = {**job, "model": str(Path(model).resolve()), "folder": str(folder)}
        if options.beside:
            found = _beside(of_model, folder, options.peer)
        elif options.cost:
            found = _cost(of_model, folder, options.rounds)
        else:
            found = run_peer(of_model, folder, f"foreseen-{options.method}", "images_foreseen")
        if found is None:
            return 1
        done.append((Path(model).name, found))
    if options.beside:
        lines, agree = compared(done)
    else:
        lines, agree = list(costs(done) if options.cost else foreseen(done)), True
    print("\n".join(lines))
    peer = {"TRL": done[0][1]["trl"]["versions"]} if options.beside else {}
    print(json.dumps({"machine": machine(), "ours": versions(), **peer}))
    return int(not agree)


def _beside(job: dict[str, Any], folder: Path, peer: str) -> dict[str, Any] | None:
    ours = run_peer(job, folder, "images_ours", "images_ours")
    if ours is None:
        return None
    given = {**job, "order": ours["order"], "ids": ours["ids"]}
    theirs = run_peer(given, folder, "trl_images", "trl_images", python=peer)
    return None if theirs is None else {"ours": ours, "trl": theirs}


def _cost(job: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any] | None:
    """Of each way, what its processes found."""
    found: dict[str, Any] = {way: [] for way in KEEPING}
    for number in range(rounds):
        for way in KEEPING if number % 2 == 0 else KEEPING[::-1]:
            turn = run_peer({**job, "way": way}, folder, f"{way}-{number}", "images_cost")
            if turn is None:
                return None
            found[way].append(turn)
    return found


def compared(done: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[str], bool]:
    """A table in Markdown, and whether all losses agree."""
    lines = [
        "| Model | First loss | Last loss, ours | SFTTrainer's | Largest difference of a step |",
        "|---|---|---|---|---|",
    ]
    agree = True
    for name, sides in done:
        ours, theirs = sides["ours"]["losses"], sides["trl"]["losses"]
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        agree = agree and worst <= LOSS_WITHIN
        lines.append(f"| {name} | {ours[0]:.6f} | {ours[-1]:.6f} | {theirs[-1]:.6f} | {worst:.1e} |")
    return lines, agree


def costs(done: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """A table in Markdown: a first epoch computes vectors in any case."""
    yield "| Model | Vectors | First epoch, s a step | Later epochs, s a step | Peak, GiB | Last loss |"
    yield "|---|---|---|---|---|---|"
    for name, ways in done:
        for way, turns in ways.items():
            first, later = (
                " ".join(f"{statistics.median(_seconds(turn)[is_later]):.2f}" for turn in turns) for is_later in (0, 1)
            )
            peak = " ".join(f"{turn['peak_bytes'] / 2**30:.2f}" for turn in turns)
            yield f"| {name} | {way} | {first} | {later} | {peak} | {turns[0]['losses'][-1]:.6f} |"


def foreseen(done: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """A table in Markdown: seconds, and by how much they were foreseen wrong."""
    yield "| Model | Seconds of | measured | by formula | error | after a probe | error |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for name, found in done:
        for what, seconds in found["foreseen"].items():
            measured = seconds["measured"]
            cells = [
                f"{seconds[way]:.3g} | {100 * (seconds[way] / measured - 1):+.0f} %" for way in ("formula", "probe")
            ]
            yield f"| {name} | a {what} | {measured:.3g} | {' | '.join(cells)} |"


def _seconds(turn: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Of the steps of the first epoch, and of later ones."""
    steps = turn["steps_per_epoch"]
    return turn["seconds"][:steps], turn["seconds"][steps:]
