"""`python -m benchmarks reranker`: the ten descriptions of ICD-10-CM that BM25 finds for a term, put in order.

A cross-encoder learns from terms with their description and the best wrong ones of BM25. Its order of the ten of each
held-out term is compared with BM25's; a term whose description is not among the ten counts 0 for both.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.embeddings import PEER
from benchmarks.measured import ROOT, environment, machine, versions

SHOWN, SEED = 10, 0
MISSED = {"rank": SHOWN + 1, "ndcg": 0.0}
"""Of a term whose description is not among those shown."""


def add_reranker(verbs: Any) -> None:
    parser = verbs.add_parser("reranker", help="a cross-encoder's order of what BM25 finds, beside BM25's own")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder of an encoder")
    add("--work", type=Path, required=True, help="a folder for rows and the run; a run that was cut off goes on")
    add("--python", type=Path, default=ROOT / ".peers" / "st" / "bin" / "python", help="one with simple-icd-10-cm")
    add("--terms", type=int, default=4000, help="terms to learn from")
    add("--negatives", type=int, default=5, help="wrong descriptions of each")
    add("--held-out", type=int, default=400, help="terms to measure on, at most 1,000")
    add("--first", type=int, default=0, help="number of the first of them, in the order of a hash")
    add("--lr", type=float, default=1e-4)
    add("--threads", type=int, default=2)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: nDCG@10 is above that of BM25's order by its paired interval; else 1."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "ranks.json").exists():
        words = [options.python, PEER, "rows", work / "terms.jsonl", work / "others.jsonl", str(options.first)]
        subprocess.run(words, check=True)
        _write_lists(work, options)
    ours, begun = work / "run", time.perf_counter()
    if not (ours / "report.json").exists():
        verb = ["resume", ours] if (ours / "run.json").exists() else _train_words(options, work, ours)
        subprocess.run([sys.executable, "-m", "tunesmith", *map(str, verb), "--quiet"], check=True, env=environment())
    print(f"{machine()}; {versions()}; this call took {time.perf_counter() - begun:.0f} s")
    lines = [json.loads(line) for line in (ours / "evaluation" / "after.jsonl").read_text("utf-8").splitlines()]
    found = {int(str(line["source"]).rpartition(":")[2]): line for line in lines}
    terms = json.loads((work / "ranks.json").read_text("utf-8"))
    return report([found.get(term["line"], MISSED) for term in terms], [term["rank"] for term in terms])


def _train_words(options: argparse.Namespace, work: Path, out: Path) -> list[Any]:
    settings = {
        "ranking.loss": "pairwise", "optim.lr": options.lr, "train.rows_per_step": 16,
        "train.epochs": 1, "threads": options.threads, "precision": "float32", "evaluation.max_rows": "null",
        "evaluation.surprising": 0, "checkpoint.every": 50,
    }  # fmt: skip
    files = ["train", options.model, work / "train.jsonl", "--eval", work / "held.jsonl", "--out", out]
    how = ["--task", "rank", "--method", "full"]
    return [*files, *how, *(word for key, value in settings.items() for word in ("--set", f"{key}={value}"))]


def _read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _write_lists(work: Path, options: argparse.Namespace) -> None:
    """train.jsonl, held.jsonl, and ranks.json: of each held-out term its line in it, if any, and its rank by BM25."""
    from tunesmith.evaluation.retrieval import Bm25

    known, others = _read(work / "terms.jsonl"), _read(work / "others.jsonl")
    documents = sorted({row["positive"] for row in [*known, *others]})
    random.Random(SEED).shuffle(documents)  # ties are broken by chance
    bm25 = Bm25(documents)

    def best(row: dict[str, str], num: int) -> list[str]:
        return [documents[m] for m in (-bm25.scores(row["anchor"])).argsort(kind="stable")[:num]]

    def listed(rows: Sequence[dict[str, str]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            wrong = [text for text in best(row, options.negatives + 1) if text != row["positive"]]
            yield {"query": row["anchor"], "positive": row["positive"], "negatives": wrong[: options.negatives]}

    held, ranks = [], []
    for row in others[: options.held_out]:
        shown = best(row, SHOWN)
        labels = [int(text == row["positive"]) for text in shown]
        if any(labels):
            held.append({"query": row["anchor"], "documents": shown, "labels": labels})
        ranks.append({"line": len(held) if any(labels) else 0, "rank": [*labels, 1].index(1) + 1})
    train = listed(random.Random(SEED).sample(known, min(options.terms, len(known))))
    for name, rows in (("train", train), ("held", held)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (work / "ranks.json").write_text(json.dumps(ranks), "utf-8")


def report(by_model: Sequence[Any], ranks: Sequence[int]) -> int:
    """Print both orders of the held-out terms; 0 if the nDCG@10 of the model's is above by its paired interval."""
    import numpy as np

    from tunesmith.evaluation.bootstrap import intervals, paired_intervals, value_of
    from tunesmith.evaluation.branch_scores import rank_statistics

    by_bm25 = [{"rank": rank, "ndcg": float(rank <= SHOWN) / np.log2(1 + rank)} for rank in ranks]
    own, other, num = rank_statistics(by_model), rank_statistics(by_bm25), len(ranks)
    moved = {key: value_of(own[key], num) - value_of(other[key], num) for key in own}
    changes, sides = paired_intervals(num, other, own, moved), [intervals(num, of) for of in (own, other)]
    print(f"{num:,} held-out terms; BM25's {SHOWN} have the right one of {sum(rank <= SHOWN for rank in ranks):,}")
    for key in ("recall_1", "mrr_10", "ndcg_10"):
        change = changes[key]
        print(f"{key}: {sides[0][key]['value']:.3f}, BM25's order {sides[1][key]['value']:.3f}, "
              f"{change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})")  # fmt: skip
    return int(changes["ndcg_10"]["low"] <= 0)
