"""`python -m benchmarks distil`: a model learns the same rows by their answers alone, by a teacher's probabilities at
their tokens, and by them at the tokens of its own answers.

The same rows, steps, rate and seed; one judge measures how far each result is from the teacher on held-out rows, paired
over these.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measured import machine, run_peer, versions

SIDES = {
    "untouched": "untouched", "sft": "answers alone (SFT)", "off": "distil, off policy", "on": "distil, on policy",
}  # fmt: skip
MEASURES = {
    "forward": "KL(teacher ‖ result), the rows' tokens",
    "reverse": "KL(result ‖ teacher), own answers",
    "answer": "loss of the rows' tokens",
    "reward": "reward of own answers",
}
AIMS = {"off": "forward", "on": "reverse"}
"""What each way makes small, by which it has to be below answers alone."""

Rows = Sequence[Sequence[float]]
"""Sum and count of each held-out row."""


def add_distil(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("distil", help="a teacher's probabilities beside its answers alone, on the same rows")
    add = parser.add_argument
    add("--model", required=True, help="a folder of a chat model, or a .gguf file: what learns")
    add("--layers", type=int, default=0, help="learn by a copy with so many of the model's layers; 0: the model")
    add("--teacher", help="a run or a model of the same vocabulary; else the model itself")
    add("--rows", nargs=2, required=True, metavar=("TRAIN", "TEST"), help="JSONL of chats, or of prompts")
    add("--answers", choices=["rows", "teacher"], default="rows", help="the rows' own, or one that the teacher draws")
    add("--grader", type=Path, help="file.py with grade(sample, item), for the answers of the results")
    add("--num-train", type=int, default=320, help="most rows that are trained on")
    add("--num-eval", type=int, default=60, help="most held-out rows")
    add("--rows-per-step", type=int, default=8)
    add("--steps", type=int, default=40)
    add("--lr", type=float, default=2e-4, help="constant")
    add("--method", default="lora", help="lora or full")
    add("--max-new-tokens", type=int, default=48, help="of an answer that is drawn")
    add("--samples", type=int, default=2, help="answers that a result draws to each held-out prompt")
    add("--seed", type=int, default=0)
    add("--precision", default="bfloat16")
    add("--threads", type=int, default=1)
    add("--work", type=Path, required=True, metavar="FOLDER", help="runs and results; what is there is kept")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: each way of distilling is below answers alone by the interval of its aim; 1: not so, or someone failed."""
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job = {key: value for key, value in vars(options).items() if isinstance(value, str | int | float)}
    train, test = (str(Path(path).resolve()) for path in options.rows)
    job |= {"model": _place(options.model), "teacher": _place(options.teacher or options.model)}
    job |= {"train_rows": train, "eval_rows": test, "folder": str(folder)}
    job["grader"] = str(options.grader.resolve()) if options.grader else ""
    start = run_peer(job, folder, "start", "distil_start")
    if start is None:
        return 1
    job |= {key: start[key] for key in ("student", "train", "eval")}
    turns: dict[str, dict[str, Any]] = {}
    for way in ("sft", "off", "on"):
        turn = run_peer({**job, "way": way}, folder, way, "distil_train")
        if turn is None:
            return 1
        turns[way] = turn
    sides = {"untouched": job["student"], **{way: turn["run"] for way, turn in turns.items()}}
    found = run_peer({**job, "sides": sides, "held": start["held"]}, folder, "judge", "distil_judge")
    if found is None:
        return 1
    judged = {side: found[side] for side in sides}
    changes = compared(judged)
    print("\n".join(page(judged, changes, turns)))
    print(json.dumps({"machine": machine(), "versions": versions(), "rows": start["num"]}))
    return int(any(changes[way][aim]["high"] >= 0 for way, aim in AIMS.items()))


def _place(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).exists() else model


def compared(judged: Mapping[str, Mapping[str, Rows]]) -> dict[str, dict[str, Any]]:
    """Of each side but answers alone, each measure less that of answers alone, with its interval paired over rows."""
    from tunesmith.evaluation.bootstrap import paired_intervals, value_of

    changes = {}
    for side, measures in judged.items():
        if side == "sft":
            continue
        ours = {key: _mean(rows) for key, rows in measures.items()}
        theirs = {key: _mean(rows) for key, rows in judged["sft"].items()}
        num = len(measures["forward"])
        differences = {key: value_of(ours[key], num) - value_of(theirs[key], num) for key in ours}
        changes[side] = paired_intervals(num, theirs, ours, differences)
    return changes


def _mean(rows: Rows) -> Any:
    """The mean over counts, as a function of the rows' weights [R, I]."""
    import numpy as np

    sums_I, counts_I = np.array(rows, dtype=np.float64).T
    return lambda weights_RI: (weights_RI @ sums_I) / (weights_RI @ counts_I)


def page(
    judged: Mapping[str, Mapping[str, Rows]], changes: Mapping[str, Mapping[str, Any]], turns: Mapping[str, Any]
) -> Iterator[str]:
    """The table, in Markdown."""
    keys = [key for key in MEASURES if key in judged["sft"]]
    yield f"| | {' | '.join(f'{MEASURES[key]} | less SFT' for key in keys)} | median step |"
    yield f"|---|{'---:|---:|' * len(keys)}---:|"
    for side, name in SIDES.items():
        cells = []
        for key in keys:
            sums, counts = zip(*judged[side][key], strict=True)
            cells.append(f"{sum(sums) / sum(counts):.4f}")
            change = changes.get(side, {}).get(key)
            cells.append("" if change is None else _interval(change))
        seconds = f"{statistics.median(turns[side]['seconds']):.1f} s" if side in turns else ""
        yield f"| {name} | {' | '.join(cells)} | {seconds} |"


def _interval(change: Mapping[str, float]) -> str:
    return f"{change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})"
