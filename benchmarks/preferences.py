"""`python -m benchmarks preferences`: DPO and TRL's DPO, on the same ids, adapter, rate and order.

Pairs are made of chats of one question and one answer with a topic: the chosen answer is the chat's own, the rejected
one that of another question of the same topic, drawn from a seed.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, machine, run_child, versions

BETA, SEED = 0.1, 0
SIDES = ("chosen", "rejected")
WARM_UP = 3
"""First steps whose seconds do not count."""


def add_preferences(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("preferences", help="DPO and TRL's DPO: losses, tokens a second, memory, accuracy")
    add_pair_options(parser, held_out=40, lr=2e-4)
    words = "ours; auto or a number, as train.tokens_per_pass"
    parser.add_argument(
        "--tokens-per-pass", type=lambda word: word if word == "auto" else int(word), default="auto", help=words
    )
    parser.set_defaults(run=run)


def add_pair_options(parser: argparse.ArgumentParser, *, held_out: int, lr: float) -> None:
    """Options of a comparison with TRL on pairs made from chats."""
    add = parser.add_argument
    add("--model", required=True, help="a folder of a chat model")
    add("--chats", required=True, nargs=2, metavar="FILE", help="JSONL of chats with a topic, to train and to test on")
    add("--peer", default=str(ROOT / ".peers" / "trl" / "bin" / "python"), help="TRL's Python")
    add("--steps", type=int, default=20)
    add("--pairs-per-step", type=int, default=8)
    add("--pairs-per-batch", type=int, default=2, help="TRL's, which accumulates them to a step")
    add("--held-out", type=int, default=held_out, help="pairs that both results are measured on")
    add("--lr", type=float, default=lr, help="constant")
    add("--precision", default="float32")
    add("--threads", type=int, default=1)
    add("--work", type=Path, required=True, metavar="FOLDER", help="pairs, runs and results; what is there is kept")


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: the losses agree to 1e-3, as they have to in float32; 1: they do not, or someone failed."""
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in zip(("train", "test"), options.chats, strict=True):
        if not (folder / f"{name}.jsonl").exists():
            size = options.pairs_per_step if name == "train" else 1
            write_pairs(folder / f"{name}.jsonl", pairs_of(Path(path)), size)
    job = {key: value for key, value in vars(options).items() if isinstance(value, str | int | float)}
    job |= {"beta": BETA, "folder": str(folder), "seed": SEED}
    (folder / "given.json").write_text(json.dumps(job), "utf-8")
    for name, python, script in (
        ("start", sys.executable, "prefer_start.py"),
        ("ours", sys.executable, "prefer_ours.py"),
        ("trl", options.peer, "trl_prefer.py"),
    ):
        if not (folder / f"{name}.json").exists():
            given = folder / ("job.json" if name == "trl" else "given.json")
            log = folder / f"{name}.log"
            command = [python, str(ROOT / "benchmarks" / "peers" / script), str(given), str(folder / f"{name}.part")]
            child = run_child(command, log=log, settings={"OMP_NUM_THREADS": str(options.threads)})
            if child.code:
                print(f"{name} failed:\n{child.tail}", file=sys.stderr)
                return 1
            found = json.loads((folder / f"{name}.part").read_text("utf-8"))
            if name == "ours":
                known = json.loads((folder / "job.json").read_text("utf-8"))
                (folder / "job.json").write_text(json.dumps({**known, "tuned": found["tuned"]}), "utf-8")
            found |= {"peak_bytes": child.peak_bytes, "load_before": child.load_before}
            (folder / f"{name}.json").write_text(json.dumps(found), "utf-8")
    return report(*(json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("ours", "trl", "job")))


def write_pairs(place: Path, pairs: Sequence[Any], size: int) -> None:
    """As many as make whole steps of `size`: an epoch that ends with fewer is nothing that TRL knows."""
    whole = pairs[: len(pairs) // size * size]
    place.write_text("".join(json.dumps(pair) + "\n" for pair in whole), "utf-8")


def pairs_of(path: Path) -> list[dict[str, Any]]:
    """A pair of each different chat whose topic has another answer."""
    draw, by_topic = random.Random(SEED), defaultdict(dict)
    for line in path.read_text("utf-8").splitlines():
        chat = json.loads(line)
        if len(chat["messages"]) == 2:
            question, answer = (message["content"] for message in chat["messages"])
            by_topic[chat["topic"]].setdefault(question, answer)
    pairs = []
    for chats in by_topic.values():
        for question, answer in chats.items():
            others = sorted({other for other in chats.values() if other != answer})
            if others:
                prompt = [{"role": "user", "content": question}]
                pairs.append({"prompt": prompt, "chosen": answer, "rejected": draw.choice(others)})
    return pairs


def report(ours: dict[str, Any], theirs: dict[str, Any], job: dict[str, Any]) -> int:
    """Print what was found."""
    worst = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    tokens, own, other = (one[WARM_UP:] for one in (ours["tokens"], ours["seconds"], theirs["seconds"]))
    speeds = [sum(tokens) / sum(seconds) for seconds in (own, other)]
    with_reference = sum(tokens) / (sum(own) + ours["reference_seconds"] * len(own))
    medians = [statistics.median(seconds) for seconds in (own, other)]
    peaks = [one["peak_bytes"] / 2**30 for one in (ours, theirs)]
    print(f"first loss {ours['losses'][0]:.6f} and {theirs['losses'][0]:.6f}, last {ours['losses'][-1]:.6f} and")
    print(f"{theirs['losses'][-1]:.6f}; of {len(ours['losses'])} steps they differ by {worst:.2e} at most")
    print(f"tokens/s {speeds[0]:,.0f} and {speeds[1]:,.0f}: {speeds[0] / speeds[1]:.2f} times")
    print(f"median step {medians[0]:.2f} and {medians[1]:.2f} s: {medians[1] / medians[0]:.2f} times")
    print(f"the first epoch, in which ours computes the reference: {with_reference / speeds[1]:.2f} times")
    print(f"memory {peaks[0]:.2f} GiB and {peaks[1]:.2f} GiB: {peaks[0] / peaks[1]:.2f}")
    for line in accuracies(job["held_out"], theirs["held_out"]):
        print(line)
    print(json.dumps({"machine": machine(), "ours": versions(), "TRL": theirs["versions"],
                      "load": [ours["load_before"], theirs["load_before"]]}))  # fmt: skip
    return int(worst > 1e-3 and job["precision"] == "float32")


def accuracies(pairs: Sequence[dict[str, list[int]]], logps: dict[str, list[list[float]]]) -> Iterator[str]:
    """How many pairs both results get right, and how far they are above two habits and each other, paired."""
    import numpy as np

    from tunesmith.evaluation.bootstrap import interval, ratio, resamples

    base_I2 = np.array(logps["base"])
    lengths_I2 = np.array([[len(pair[f"{side}_ids"]) for side in SIDES] for pair in pairs])
    by = {name: np.array(logps[name]) - base_I2 for name in ("ours", "trl")}
    by |= {"the longer answer": lengths_I2, "the likelier answer": base_I2 / lengths_I2}
    right = {name: (1 + np.sign(of_I2[:, 0] - of_I2[:, 1])) / 2 for name, of_I2 in by.items()}
    sums, other = (right["ours"].sum(), right["trl"].sum()), int((right["ours"] != right["trl"]).sum())
    yield f"held-out pairs right, of {len(pairs)}: {sums[0]:g} and {sums[1]:g}; {other} decided otherwise"
    for name in ("trl", "the longer answer", "the likelier answer"):
        above_I = right["ours"] - right[name]
        drawn = np.concatenate([ratio(above_I)(weights) for weights in resamples(len(pairs))])
        low, high = (interval(above_I.mean(), drawn, len(above_I))[end] for end in ("low", "high"))
        yield f"ours above {name} ({right[name].mean():.1%}): {above_I.mean():+.1%} ({low:+.1%} to {high:+.1%})"
