"""`python -m benchmarks rewards`: a reward model and TRL's RewardTrainer, on the same ids, start, rate and order.

No reviews with ratings come with the project, so ratings are made of real chats: the chat's own answer has 2, that of
another question of the topic 1, that of another topic 0. A pair is any two of them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, machine, run_child, versions
from benchmarks.preferences import add_pair_options, write_pairs

CENTER, SEED, WARM_UP = 0.01, 0, 3
PEERS = ROOT / "benchmarks" / "peers"


def add_rewards(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("rewards", help="a reward model and TRL's: losses, tokens a second, memory, accuracy")
    add_pair_options(parser, held_out=100, lr=1e-4)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: the losses agree to 1e-3, and accuracies within their interval; 1: they do not, or someone failed."""
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in zip(("train", "test"), options.chats, strict=True):
        size = options.pairs_per_step if name == "train" else 1
        write_pairs(folder / f"{name}.jsonl", list(rated_pairs(Path(path))), size)
    job = {key: value for key, value in vars(options).items() if isinstance(value, str | int | float)}
    (folder / "given.json").write_text(json.dumps({**job, "center": CENTER, "folder": str(folder), "seed": SEED}))
    results = []
    for name, python, given in (("reward_ours", sys.executable, "given"), ("trl_reward", options.peer, "job")):
        found = folder / f"{name}.json"
        if not found.exists():
            command = [python, str(PEERS / f"{name}.py"), str(folder / f"{given}.json"), str(folder / "part.json")]
            child = run_child(command, log=folder / f"{name}.log", settings={"OMP_NUM_THREADS": str(options.threads)})
            if child.code:
                print(f"{name} failed:\n{child.tail}", file=sys.stderr)
                return 1
            result = json.loads((folder / "part.json").read_text("utf-8"))
            result |= {"peak_bytes": child.peak_bytes, "load_before": child.load_before}
            found.write_text(json.dumps(result), "utf-8")
        results.append(json.loads(found.read_text("utf-8")))
    return report(*results)


def rated_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """A pair of two answers to each question, of which the one rated higher is chosen."""
    draw = random.Random(SEED)
    chats = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    chats = [
        (chat["topic"], *(turn["content"] for turn in chat["messages"])) for chat in chats if len(chat["messages"]) == 2
    ]
    seen: set[str] = set()
    for topic, question, answer in chats:
        near = sorted({other for name, _, other in chats if name == topic} - {answer})
        far = sorted({other for name, _, other in chats if name != topic} - {answer, *near})
        if question in seen or not near or not far:
            continue
        seen.add(question)
        rated = ((answer, 2), (draw.choice(near), 1), (draw.choice(far), 0))
        better, worse = draw.choice(list(combinations(rated, 2)))
        yield {"prompt": [{"role": "user", "content": question}], "chosen": better[0], "rejected": worse[0],
               "score_chosen": better[1], "score_rejected": worse[1]}  # fmt: skip


def report(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    """Print what was found."""
    worst = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    speeds = [ours["tokens"] / statistics.median(one["seconds"][WARM_UP:]) for one in (ours, theirs)]
    peaks = [one["peak_bytes"] / 2**30 for one in (ours, theirs)]
    sides = (ours["margins"], theirs["margins"]["ours"], theirs["margins"]["trl"])
    right = [sum(margin > 0 for margin in side) / len(side) for side in sides]
    spread = 1.96 * (right[2] * (1 - right[2]) / len(sides[2])) ** 0.5
    loaded = max(abs(a - b) for a, b in zip(*sides[:2], strict=True))
    print(f"first loss {ours['losses'][0]:.6f} and {theirs['losses'][0]:.6f}, last {ours['losses'][-1]:.6f} and "
          f"{theirs['losses'][-1]:.6f}; of {len(ours['losses'])} steps they differ by {worst:.2e} at most")  # fmt: skip
    print(f"tokens/s {speeds[0]:,.0f} and {speeds[1]:,.0f}: {speeds[0] / speeds[1]:.2f} times")
    print(f"memory {peaks[0]:.2f} GiB and {peaks[1]:.2f} GiB: {peaks[0] / peaks[1]:.2f}")
    print(f"held-out pairs right, of {len(sides[0])}: {right[0]:.1%} and TRL's {right[2]:.1%} (± {spread:.1%})")
    print(f"our adapter loaded there gives margins that differ by {loaded:.2e} at most")
    print(json.dumps({"machine": machine(), "ours": versions(), "TRL": theirs["versions"],
                      "load": [ours["load_before"], theirs["load_before"]]}))  # fmt: skip
    return int(worst > 1e-3 or abs(right[0] - right[2]) > spread or loaded > 1e-3)
