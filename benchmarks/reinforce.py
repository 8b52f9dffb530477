"""`python -m benchmarks reinforce`: task reinforce and TRL's GRPOTrainer.

`equal`: one step's answers, drawn by ours, given to GRPOTrainer's own `_compute_loss` in float32, for each loss and
divisor that both have. `beside trl`: both train from the same prompts, in their order, at the same rate, in turns; then
one judge draws answers of both to held-out prompts, with the same random numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, machine, run_peer, versions

LOSS_WITHIN, COSINE_WITHIN = 1e-5, 1e-6
WARM_UP = 1
"""First steps whose seconds do not count."""
DIVISORS = ("tokens", "answers", "constant")
SETTINGS: list[dict[str, Any]] = [
    {"loss": loss, "normalize": normalize, "kl": kl, "moved": moved}
    for loss in ("clip", "sequence", "cispo")
    for normalize in (DIVISORS if loss != "cispo" else DIVISORS[:1])  # TRL's cispo has one divisor
    for kl in (0.0, 0.04)
    for moved in (False, True)
    if not (loss == "sequence" and kl)
]
"""`moved`: the weights have moved since the answers were drawn, so that ratios are not 1 and some are clipped. With
`sequence` and β TRL gives the divergence of a token the ratio of the whole answer, which has another gradient."""


def add_reinforce(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("reinforce", help="learning from rewards, and TRL's GRPOTrainer: losses, time, memory")
    add = parser.add_argument
    add("--beside", choices=["trl"], help="a race; without it the losses of one step are compared")
    add("--model", required=True, help="a folder of a chat model, or a .gguf file")
    add("--prompts", type=Path, required=True, help="JSONL of prompts, as task reinforce reads it")
    add("--grader", type=Path, required=True, help="file.py with grade(sample, item)")
    add("--peer", default=str(ROOT / ".peers" / "trl" / "bin" / "python"), help="TRL's Python")
    add("--rows-per-step", type=int, default=8, help="prompts of a step")
    add("--samples", type=int, default=8, help="answers to each")
    add("--max-new-tokens", type=int, default=32)
    add("--steps", type=int, default=20, help="of a race")
    add("--rounds", type=int, default=3, help="turns of each in a race")
    add("--rows-per-pass", type=int, default=8, help="TRL's, which accumulates them to a step")
    add("--held-out", type=int, default=24, help="prompts that the judge asks after a race")
    add("--lr", type=float, default=2e-4, help="constant")
    add("--precision", default="bfloat16", help="of a race; losses are compared in float32")
    add("--threads", type=int, default=2)
    add("--work", type=Path, required=True, metavar="FOLDER", help="runs and results; what is there is kept")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: losses and gradients agree, or ours is nowhere worse; 1: not so, or someone failed."""
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job = {key: value for key, value in vars(options).items() if isinstance(value, str | int | float)}
    job |= {"prompts": str(options.prompts.resolve()), "grader": str(options.grader.resolve()), "folder": str(folder)}
    if options.beside:
        return _race(job, folder, options.peer)
    job |= {"precision": "float32", "settings": SETTINGS}
    sides = {"ours": sys.executable, "trl": options.peer}
    found = [run_peer(job, folder, side, f"reinforce_{side}", python=python) for side, python in sides.items()]
    ours, theirs = found
    if ours is None or theirs is None:
        return 1
    lines, agree = compared(ours["settings"], theirs["settings"], cosines(folder))
    print("\n".join(lines))
    print(json.dumps({"machine": machine(), "ours": versions(), "TRL": theirs["versions"], **ours["answers"]}))
    return int(not agree)


def cosines(folder: Path) -> list[float]:
    """Cosine of both sides' gradients in each setting, over all trained weights together."""
    import numpy as np
    from safetensors.numpy import load_file

    found = []
    for number in range(len(SETTINGS)):
        ours, theirs = (load_file(folder / f"{side}-{number}.safetensors") for side in ("ours", "trl"))
        if ours.keys() != theirs.keys():
            raise ValueError(f"setting {number}: the sides have other trained weights: {ours.keys() ^ theirs.keys()}")
        a, b = (
            np.concatenate([side[name].ravel() for name in sorted(ours)]).astype(np.float64) for side in (ours, theirs)
        )
        found.append(float(a @ b / math.sqrt((a @ a) * (b @ b))))
    return found


def compared(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], cosines: Sequence[float]
) -> tuple[list[str], bool]:
    """A table in Markdown, and whether all agree."""
    lines = [
        "| Loss, divisor, β | Ratios | Ours | GRPOTrainer | Difference | 1 − cosine of gradients |",
        "|---|---|---|---|---|---|",
    ]
    agree = True
    for setting, own, other, cosine in zip(SETTINGS, ours, theirs, cosines, strict=True):
        away = abs(own["loss"] - other["loss"])
        agree = agree and away <= LOSS_WITHIN and 1 - cosine <= COSINE_WITHIN
        ratios = f"moved, {own['clipped']:.0%} clipped" if setting["moved"] else "1"
        name = f"`{setting['loss']}`, `{setting['normalize']}`, {setting['kl']:g}"
        losses = f"{own['loss']:.7f} | {other['loss']:.7f} | {away:.1e}"
        lines.append(f"| {name} | {ratios} | {losses} | {1 - cosine:.1e} |")
    return lines, agree


def _race(job: dict[str, Any], folder: Path, peer: str) -> int:
    """Rounds in turns, the first of a round by turns too. The number of a round is the seed of its order."""
    rounds: list[dict[str, dict[str, Any]]] = []
    start: dict[str, Any] = {}
    for number in range(job["rounds"]):
        of_round = run_peer({**job, "seed": number}, folder, f"start-{number}", "reinforce_start")
        if of_round is None:
            return 1
        start = start or of_round  # whose held-out prompts are those of every round
        sides = [("ours", sys.executable), ("trl", peer)]
        found = {}
        for side, python in sides if number % 2 == 0 else sides[::-1]:
            of_side = {**job, **of_round, "seed": number}
            turn = run_peer(of_side, folder, f"{side}-{number}", f"reinforce_{side}", python=python)
            if turn is None:
                return 1
            found[side] = turn
        rounds.append(found)
        print("\n".join(_round(number, found)), file=sys.stderr, flush=True)
    adapters = [{side: found[side]["adapter"] for side in found} for found in rounds]
    judged = run_peer({**job, **start, "adapters": adapters}, folder, "judge", "reinforce_judge")
    if judged is None:
        return 1
    for line in raced(rounds, judged):
        print(line)
    print(json.dumps({"machine": machine(), "ours": versions(), "TRL": rounds[0]["trl"]["versions"]}))
    return int(any(of_round["ours_less_trl"]["high"] < 0 for of_round in judged["rounds"]))


def _round(number: int, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    for side, turn in found.items():
        seconds = statistics.median(turn["seconds"][WARM_UP:])
        yield f"round {number}, {side}: {seconds:.1f} s a step, {turn['peak_bytes'] / 2**30:.2f} GiB"


def raced(rounds: Sequence[dict[str, dict[str, Any]]], judged: dict[str, Any]) -> Iterator[str]:
    """The page, in Markdown."""
    yield "| Round | | Median step | Peak | Reward of last five steps | Held-out reward | Rose by | Ended | Tokens |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield f"| | untouched | | | | {_held_out(judged['untouched'], '')} |"
    for number, (found, of_round) in enumerate(zip(rounds, judged["rounds"], strict=True)):
        for side in ("ours", "trl"):
            turn = found[side]
            step, peak = statistics.median(turn["seconds"][WARM_UP:]), turn["peak_bytes"] / 2**30
            last, held = statistics.fmean(turn["rewards"][-5:]), of_round[side]
            taught = _held_out(held, _interval(held["rose"]))
            yield f"| {number} | {side} | {step:.1f} s | {peak:.2f} GiB | {last:.3f} | {taught} |"
    ratios = {
        "steps a minute": [
            statistics.median(found["trl"]["seconds"][WARM_UP:]) / statistics.median(found["ours"]["seconds"][WARM_UP:])
            for found in rounds
        ],
        "peak memory": [found["ours"]["peak_bytes"] / found["trl"]["peak_bytes"] for found in rounds],
    }
    for name, values in ratios.items():
        yield f"{name}, ours over TRL's: {', '.join(f'{value:.2f}' for value in values)}"
    for number, of_round in enumerate(judged["rounds"]):
        difference = _interval(of_round["ours_less_trl"])
        yield f"round {number}: held-out reward, ours less TRL's: {difference}, paired over prompts"


def _held_out(measures: dict[str, Any], rose: str) -> str:
    return f"{measures['reward']:.3f} | {rose} | {measures['ended']:.0%} | {measures['answer_tokens']:.1f}"


def _interval(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
