"""The words of `python -m benchmarks train`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.classify import UnusableError
from benchmarks.methods_page import put_into
from benchmarks.rows import make_rows
from benchmarks.table import place
from benchmarks.train import PEERS, Race, Settings, Turn, measure_held_out
from benchmarks.train_page import BEGIN, END, page, read_turns

RATES = {"lora": 5e-4, "full": 5e-5}


def add_train(verbs: Any) -> None:
    train = verbs.add_parser(
        "train",
        help="tokens a second of training, memory and held-out loss, beside other tools",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = train.add_argument
    add("--model", required=True, help="a folder of a chat model")
    add("--rows", nargs=3, action="append", required=True, metavar=("NAME", "TRAIN", "HELD_OUT"), help="JSONL, or CSV")
    add("--work", type=Path, required=True, help="a folder for rows and results; a race that was cut off goes on")
    add("--environments", type=Path, default=Path(".peers"), help="made by python -m benchmarks.environments")
    add("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    add("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER", help=", ".join(PEERS))
    add("--beside", metavar="PYTHON", help="interpreter of another checkout of Tunesmith, which takes its turns too")
    add("--rounds", type=int, default=3, help="turns of each contestant")
    add("--steps", type=int, default=20)
    add("--rows-per-step", type=int, default=16)
    add("--held-out", type=int, default=64, help="rows that the loss is measured on afterwards")
    add("--max-words", type=int, help="documents of rows are cut to so many words")
    add("--rank", type=int, default=16)
    add("--alpha", type=int, default=32)
    add("--threads", type=int, default=2, help="of each contestant")
    add("--minutes", type=float, default=float("inf"), help="no turn is begun after so long; the next call goes on")
    add("--only", choices=["race", "judge"], help="race: without the held-out losses; judge: only those and the page")
    add("--out", type=Path, metavar="TABLE.md", help="the page, of everything in the work folder")
    add("--page", type=Path, help="a page with the two markers between which the table goes too")
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace, words: Sequence[str]) -> int:
    # libgomp's own default for all: what Tunesmith's launcher sets beside a busy program would be set for it alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    until = time.monotonic() + 60 * options.minutes
    race = Race(
        options.work.resolve(), options.environments.resolve(), options.peers, options.rounds, until, options.beside
    )
    if options.only != "judge":
        missing = {PEERS[name].environment for name in options.peers}
        missing = {name for name in missing if not (race.environments / name / "bin" / "python").exists()}
        if missing:
            made = f"python -m benchmarks.environments {race.environments} {' '.join(sorted(missing))}"
            raise UnusableError(
                f"{race.environments}: no environment for {', '.join(sorted(missing))}. Make it: {made}"
            )
    for name, train, held_out in options.rows:
        _one(options, race, name, train, held_out)
    turns = read_turns(race.work)
    facts = {name: _facts(race.work / "rows" / name) for name in {turn.settings["rows"] for turn in turns}}
    text = page(shlex.join(["python", "-m", "benchmarks", *map(place, words)]), turns, facts)
    if options.out:
        options.out.write_text(text, "utf-8")
    if options.page:
        put_into(options.page, text, first=BEGIN, last=END)
    print(text)
    return int(any(turn.error for turn in turns))


def _one(options: argparse.Namespace, race: Race, name: str, train: str, held_out: str) -> None:
    """Every method on one set of rows."""
    num = options.steps * options.rows_per_step
    how = {"num": num, "num_held_out": options.held_out, "max_words": options.max_words}
    make_rows(race.work / "rows" / name, options.model, train, held_out, **how)
    for method in options.methods:
        settings = Settings(
            model=str(Path(options.model).resolve()),
            rows=name,
            method=method,
            rank=options.rank,
            alpha=options.alpha,
            lr=RATES[method],
            rows_per_step=options.rows_per_step,
            steps=options.steps,
            threads=options.threads,
        )
        if options.only != "judge":
            for turn in race.turns(settings):
                print(_line(turn), file=sys.stderr, flush=True)
        if options.only != "race":
            measure_held_out(race, settings)


def _line(turn: Turn) -> str:
    what = f"[{turn.round + 1}] {turn.settings['rows']}, {turn.settings['method']}, {turn.name}"
    if turn.error:
        return f"{what}: failed: {turn.error}"
    peak = turn.child["peak_bytes"] / 2**30
    return f"{what}: {turn.tokens_per_second:.0f} tokens/s, {peak:.2f} GiB, first step {turn.first_step_seconds:.1f} s"


def _facts(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "rows.json").read_text("utf-8"))["train"]
    return {
        "rows": len(rows),
        "tokens": statistics.mean(len(row["ids"]) for row in rows),
        "targets": statistics.mean(sum(row["trained"][1:]) for row in rows),
    }
