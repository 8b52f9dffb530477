"""`python -m benchmarks embeddings`: terms of ICD-10-CM and their descriptions, beside sentence-transformers.

Both learn the same rows in the same order, in float32 and without dropout: the losses of each step have to agree, and
its seconds are compared. What is learnt is measured beside the untouched model and BM25.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measured import ROOT, machine, versions

PEER = ROOT / "benchmarks" / "peers" / "st_embed.py"
WARM = 2
"""First steps, whose seconds do not count."""


def add_embeddings(verbs: Any) -> None:
    parser = verbs.add_parser("embeddings", help="vectors of texts, beside sentence-transformers' cached loss")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder of sentence-transformers")
    add("--work", type=Path, required=True, help="a folder for rows and runs")
    add("--python", type=Path, default=ROOT / ".peers" / "st" / "bin" / "python", help="the peer's")
    add("--steps", type=int, default=24, help="updates of ours")
    add("--peer-steps", type=int, default=12, help="of these the first ones, which the peer takes too")
    add("--rows-per-step", type=int, default=256)
    add("--tokens-per-pass", default="auto", help="ours; auto: a whole step in one, as far as memory allows")
    add("--mini-batch", type=int, default=32, help="the peer's, in texts")
    add("--lr", type=float, default=1e-4)
    add("--documents", type=int, default=4000, help="among which held-out terms look for their description")
    add("--threads", type=int, default=1)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, words: Sequence[str]) -> int:
    """0: the losses agree within 1e-4 and recall@1 is above that before and that of BM25; else 1."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    train, held = work / "train.jsonl", work / "held.jsonl"
    subprocess.run([options.python, PEER, "rows", train, held], check=True)
    ours = work / "ours"
    if (ours / "run.json").exists() and not (ours / "report.json").exists():
        subprocess.run([sys.executable, "-m", "tunesmith", "resume", ours, "--quiet"], check=True)
    elif not ours.exists():
        _train(options, _without_dropout(options.model, work / "model"), train, held, ours)
    steps = [json.loads(line) for line in (ours / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in steps if event["kind"] == "step"]
    rows = [json.loads(line) for line in train.read_text("utf-8").splitlines()]
    pairs = [[(rows[i]["anchor"], rows[i]["positive"]) for i in event["values"]["rows"]] for event in steps]
    job, result = work / "job.json", work / "peer.json"
    fields = {
        "model": str(work / "model"),
        "steps": pairs[: options.peer_steps],
        "lr": options.lr,
        "threads": options.threads,
    }
    job.write_text(json.dumps({**fields, "mini_batch": options.mini_batch}), "utf-8")
    subprocess.run([options.python, PEER, "train", job, result], check=True)
    found = _page(steps, json.loads(result.read_text("utf-8")), json.loads((ours / "report.json").read_text("utf-8")))
    print("\n".join(found.pop("lines")))
    return int(not all(found.values()))


def _without_dropout(model: Path, place: Path) -> Path:
    shutil.copytree(model, place, dirs_exist_ok=True)
    config = json.loads((place / "config.json").read_text("utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (place / "config.json").write_text(json.dumps(config), "utf-8")
    return place


def _train(options: argparse.Namespace, model: Path, train: Path, held: Path, out: Path) -> None:
    settings = {
        "train.rows_per_step": options.rows_per_step, "train.max_steps": options.steps, "optim.lr": options.lr,
        "train.tokens_per_pass": options.tokens_per_pass, "optim.schedule": "constant", "optim.warmup": 0,
        "precision": "float32", "threads": options.threads, "evaluation.max_rows": "null", "train.epochs": 10,
        "evaluation.surprising": 0, "checkpoint.every": 8, "embed.documents": options.documents,
    }  # fmt: skip
    words = [sys.executable, "-m", "tunesmith", "train", model, train, "--eval", held, "--out", out, "--quiet"]
    words += ["--task", "embed", "--method", "full"]
    for key, value in settings.items():
        words += ["--set", f"{key}={value}"]
    subprocess.run(list(map(str, words)), check=True)


def _page(steps: Sequence[Any], peer: Any, report: Any) -> dict[str, Any]:
    """Lines to print, and whether each claim holds."""
    both = steps[: len(peer["losses"])]
    apart = [abs(event["values"]["loss"] - loss) for event, loss in zip(both, peer["losses"], strict=True)]
    ours = median(event["timing"]["seconds"] for event in both[WARM:])
    theirs = median(peer["seconds"][WARM:])
    after, before = report["metrics"]["after"]["measures"], report["metrics"]["before"]["measures"]
    changes = {"before": report["changes"]["recall_1"], "BM25": report["baseline"]["measures"]["recall_1"]["change"]}
    bm25 = report["baseline"]["measures"]["recall_1"]["value"]
    passes = sorted({event["values"]["passes"] for event in steps})
    lines = [
        f"{machine()}; {versions()}; peer: {peer['versions']}",
        f"{len(steps)} steps of {len(steps[0]['values']['rows'])} rows in {passes} micro-batches",
        f"losses of {len(both)} steps apart: at most {max(apart):.2g}; the first is {peer['losses'][0]:.5f}",
        f"seconds a step, median: {ours:.2f}, peer {theirs:.2f}, ratio {ours / theirs:.2f}",
        f"recall@1: {after['recall_1']['value']:.3f}, before {before['recall_1']['value']:.3f}, BM25 {bm25:.3f}",
        *(
            f"recall@1 above {name}: {one['value']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"
            for name, one in changes.items()
        ),
        f"nDCG@10: {after['ndcg_10']['value']:.3f}, before {before['ndcg_10']['value']:.3f}",
    ]
    return {"lines": lines, "losses": max(apart) <= 1e-4, **{name: one["low"] > 0 for name, one in changes.items()}}
