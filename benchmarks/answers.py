"""`python -m benchmarks answers`: the answers that a run writes to held-out prompts, beside another checkout's.

Both write greedy answers to the same prompts, in turns, each in a process of its own; the seconds are those that
answers add to measuring the rows of these prompts, as a run does. Where two answers part, the two tokens are named with
their logits in float32: in bfloat16 numbers that near are one, and what follows is another text.
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

from benchmarks.measured import machine, run_peer, versions

BITS = 8
"""Of a bfloat16's significand, with the one that is not stored."""


def add_answers(verbs: Any) -> None:
    """The verb's own words."""
    parser = verbs.add_parser("answers", help="a run's answers to held-out prompts, beside another checkout's")
    add = parser.add_argument
    add("--model", required=True, help="a folder of a chat model, or a .gguf file")
    add("--chats", required=True, nargs=2, metavar=("TRAIN", "TEST"), help="JSONL of chats; prompts are of the second")
    add("--beside", metavar="PYTHON", help="interpreter of another checkout, whose turn comes first")
    add("--num", type=int, default=48, help="answers")
    add("--tokens", type=int, nargs="+", default=[32, 64], help="most of an answer, one after the other")
    add("--rounds", type=int, default=2, help="turns of each")
    add("--precision", default="bfloat16")
    add("--threads", type=int, default=1)
    add("--work", type=Path, required=True, metavar="FOLDER", help="results; what is there is not run again")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: all of it ran; 1: a turn failed."""
    folder = options.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chats, model = [str(Path(path).resolve()) for path in options.chats], Path(options.model)
    job = {"model": str(model.resolve()) if model.exists() else options.model, "chats": chats}
    job |= {key: getattr(options, key) for key in ("num", "tokens", "precision", "threads")}
    sides = {"other": options.beside, "ours": sys.executable} if options.beside else {"ours": sys.executable}
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(options.rounds):
        order = list(sides) if number % 2 == 0 else list(sides)[::-1]
        found = {side: _written(job, folder, f"{side}-{number}", sides[side]) for side in order}
        if None in found.values():
            return 1
        rounds.append(found)
    print("\n".join(timed(rounds, options.tokens)))
    for tokens in map(str, options.tokens) if options.beside else ():
        pairs = parting(*(rounds[0][side]["ids"][tokens] for side in ("other", "ours")))
        judged = run_peer({**job, "pairs": pairs}, folder, f"ties-{options.precision}-{tokens}", "answers_ties")
        if judged is None:
            return 1
        print("\n".join(["", *tied(judged["ties"], tokens, options.num)]))
    print(json.dumps({"machine": machine(), "ours": versions(), "load": [of["ours"]["load_before"] for of in rounds]}))
    return 0


def _written(job: dict[str, Any], folder: Path, name: str, python: str) -> dict[str, Any] | None:
    """The answers of a turn and their seconds; None: it failed. Another interpreter has a package of its own."""
    settings = {} if python == sys.executable else {"PYTHONPATH": ""}
    job = {**job, "folder": str(folder / name)}
    return run_peer(job, folder, name, "answers_write", python=python, settings=settings)


def timed(rounds: Sequence[dict[str, dict[str, Any]]], tokens: Sequence[int]) -> Iterator[str]:
    """The seconds of each turn, and the ratio of each round."""
    sides = sorted(rounds[0], reverse=True)
    heads = [f"round {number}, {side}" for number in range(len(rounds)) for side in sides]
    yield f"| at most tokens | {' | '.join(heads)} |"
    yield f"|---|{'---:|' * len(heads)}"
    for most in map(str, tokens):
        seconds = [of_round[side]["seconds"][most] for of_round in rounds for side in sides]
        yield f"| {most} | {' | '.join(f'{value:.1f} s' for value in seconds)} |"
    for most in map(str, tokens) if len(sides) > 1 else ():
        ratios = [of_round["other"]["seconds"][most] / of_round["ours"]["seconds"][most] for of_round in rounds]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        yield f"{most} tokens: times as fast: {each}, in the median {statistics.median(ratios):.2f}"


def parting(others: Sequence[dict[str, list[int]]], ours: Sequence[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """Of each pair of answers that are not alike: the first two tokens that differ, and all before them."""
    pairs = []
    for number, (other, own) in enumerate(zip(others, ours, strict=True)):
        if other["prompt"] != own["prompt"]:
            raise ValueError(f"answer {number}: the prompts differ")
        both = list(zip(other["answer"], own["answer"], strict=False))
        at = next((i for i, (a, b) in enumerate(both) if a != b), None)
        if at is not None:
            common = [*own["prompt"], *own["answer"][:at]]
            pairs.append({"answer": number, "at": at, "tokens": list(both[at]), "common": common})
    return pairs


def spacing(value: float) -> float:
    """Distance of two neighbours in bfloat16 around a number."""
    return math.ldexp(1.0, math.frexp(abs(value))[1] - BITS)


def tied(ties: Sequence[dict[str, Any]], tokens: str, num: int) -> Iterator[str]:
    """A table of the tokens at which answers part."""
    yield f"At most {tokens} tokens: {num - len(ties)} of {num} answers are alike."
    if not ties:
        return
    yield "| Answer, token | Other, ours | Logits in float32 | Gap | Spacing | Gap in spacings | Rounding | Ranks |"
    yield "|---|---|---|---:|---:|---:|---:|---|"
    shares = []
    for tie in ties:
        gap, step = abs(tie["logits"][0] - tie["logits"][1]), spacing(max(map(abs, tie["logits"])))
        shares.append(gap / step)
        logits = ", ".join(f"{value:.3f}" for value in tie["logits"])
        words = ", ".join(f"`{json.dumps(token, ensure_ascii=False)}`" for token in tie["tokens"])
        ranks = ", ".join(map(str, tie["ranks"]))
        numbers = f"{gap:.4f} | {step:g} | {gap / step:.2f} | {tie['rounding']:.3f} | {ranks}"
        yield f"| {tie['answer']}, {tie['at']} | {words} | {logits} | {numbers} |"
    near = sum(share <= 1 for share in shares)
    rounded = sum(abs(tie["logits"][0] - tie["logits"][1]) <= 2 * tie["rounding"] for tie in ties)
    yield (
        f"{near} of {len(ties)} gaps are within one spacing of bfloat16, the largest is {max(shares):.2f} spacings. "
        f"{rounded} are within what rounding moves two logits there."
    )
