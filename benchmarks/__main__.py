"""`python -m benchmarks NAME`: Tunesmith beside other tools; benchmarks/README.md says what is measured and how."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import planning
from benchmarks import serve as race
from benchmarks.answers import add_answers
from benchmarks.classify import OURS, PEERS, Settings, UnusableError, contests, cut_rows, read_rows
from benchmarks.devices import add_devices
from benchmarks.distil import add_distil
from benchmarks.embeddings import add_embeddings
from benchmarks.experts import add_experts
from benchmarks.group import add_group
from benchmarks.images import add_images
from benchmarks.measured import machine, versions
from benchmarks.methods_command import add_methods
from benchmarks.preferences import add_preferences
from benchmarks.reinforce import add_reinforce
from benchmarks.reranker import add_reranker
from benchmarks.results import Result
from benchmarks.rewards import add_rewards
from benchmarks.roofline import add_roofline
from benchmarks.step import add_step
from benchmarks.table import Bench, as_json, markdown, place, verdicts
from benchmarks.train_command import add_train
from benchmarks.whole import add_whole


def main(words: Sequence[str] | None = None) -> int:
    """0: every run ended well and ours is nowhere worse; 1 otherwise; 2: the command cannot be used."""
    words = list(sys.argv[1:] if words is None else words)
    options = _parser().parse_args(words)
    try:
        return options.run(options, words)
    except UnusableError as error:
        print(error, file=sys.stderr)
        return 2


def _compare(options: argparse.Namespace, words: Sequence[str]) -> int:
    # libgomp's own default for all: what Tunesmith's launcher sets beside a busy program would be set for it alone.
    os.environ.setdefault("GOMP_SPINCOUNT", "300000")
    if options.model.endswith(".gguf") and not options.ours_only:
        raise UnusableError(f"{options.model}: the Trainer trains no GGUF files. Add --ours-only, or give a folder.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
        if options.max_rows:
            settings = cut_rows(settings, options.max_rows, folder)
        return _run(options, settings, folder, command=shlex.join(["python", "-m", "benchmarks", *map(place, words)]))


def _run(options: argparse.Namespace, settings: Settings, folder: Path, *, command: str) -> int:
    train, test = ([row["label"] for row in read_rows(path)] for path in (settings.train, settings.eval))
    peers = [] if options.ours_only else [name for name in PEERS if name.rpartition(" ")[2] in options.peers]
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        options.set.append(f"threads={options.threads}")
    extra = dict(setting.partition("=")[::2] for setting in options.set)
    results: list[Result] = []
    bench = Bench(
        command=command,
        settings=dataclasses.asdict(settings),
        rows={"train": len(train), "eval": len(test)},
        majority=test.count(Counter(train).most_common(1)[0][0]) / len(test),
        machine=machine(),
        versions=versions(),
        arguments={OURS: {"method": options.method, **extra}, **{name: PEERS[name] for name in peers}},
        results=results,
    )
    calls = contests(
        settings,
        seeds=range(options.seeds),
        method=options.method,
        peers=peers,
        extra=options.set,
        folder=folder,
    )
    for num, call in enumerate(calls, start=1):
        results.append(call())
        print(f"[{num}/{len(calls)}] {_line(results[-1])}", file=sys.stderr, flush=True)
        if options.out:  # after each run: what is done stays when a later one is interrupted
            options.out.write_text(markdown(bench), "utf-8")
            options.out.with_suffix(".json").write_text(json.dumps(as_json(bench), indent=2) + "\n", "utf-8")
    print(markdown(bench))
    return int(any(result.error for result in results) or any(holds is False for holds, _ in verdicts(bench)))


def _line(result: Result) -> str:
    if result.scores is None or result.timing is None:
        return f"{result.name}, seed {result.seed}: failed: {result.error}"
    return (
        f"{result.name}, seed {result.seed}: accuracy {result.scores.accuracy:.3f}, "
        f"macro-F1 {result.scores.macro_f1:.3f}, {result.timing.examples_per_second:.1f} examples/s, "
        f"{result.child.wall_seconds:.0f} s in all, {result.child.peak_bytes / 2**30:.2f} GiB"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="NAME")
    classify = verbs.add_parser(
        "classify",
        help="a class for each text, beside transformers.Trainer",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = classify.add_argument
    add("--model", required=True, help="a folder, a hub id, or with --ours-only a .gguf file")
    add("--train", required=True, help="CSV with the columns text and label")
    add("--eval", required=True, help="the same, to test on")
    add("--seeds", type=int, default=3, help="runs of each contestant, with the seeds 0, 1, ...")
    add("--epochs", type=int, default=3, help="passes over the training rows")
    add("--rows-per-step", type=int, default=16, help="rows of one update")
    add("--lr", type=float, default=1e-4, help="peak rate; linear to zero")
    add("--warmup", type=float, default=0.05, help="share of the steps, from 1 up their number")
    add("--weight-decay", type=float, default=0.0, help="decoupled")
    add("--max-tokens", type=int, default=256, help="longer texts are cut")
    add("--max-rows", type=int, help="only the first rows of both files, to try it out")
    add("--method", default="full", help="ours: full or lora")
    add("--set", action="append", default=[], metavar="OPTION=VALUE", help="ours: any other option of a recipe")
    add("--threads", type=int, help="of every contestant; else each takes what it takes")
    add("--peers", nargs="*", default=["shipped", "tuned"], metavar="PEER", help="shipped, tuned")
    add("--ours-only", action="store_true", help="without the peers")
    add("--out", type=Path, metavar="TABLE.md", help="the page; beside it TABLE.json with every single result")
    add("--keep", metavar="FOLDER", help="a new folder for what the runs leave; else it is removed")
    classify.set_defaults(run=_compare)
    _add_serve(verbs)
    add_answers(verbs)
    add_train(verbs)
    add_devices(verbs)
    add_distil(verbs)
    add_group(verbs)
    add_embeddings(verbs)
    add_experts(verbs)
    add_images(verbs)
    add_methods(verbs)
    add_preferences(verbs)
    add_reinforce(verbs)
    add_reranker(verbs)
    add_rewards(verbs)
    add_step(verbs)
    add_roofline(verbs)
    planning.add_parser(verbs)
    add_whole(verbs)
    return parser


def _add_serve(verbs: Any) -> None:
    serve = verbs.add_parser(
        "serve",
        help="tokens a second of many streams, beside transformers.generate and llama.cpp",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = serve.add_argument
    add("--model", required=True, help="a folder of a chat model")
    add("--llama-cpp", nargs="*", default=[], metavar="FILE.gguf", help="the same weights, a file a precision")
    add("--rounds", type=int, default=3, help="turns of each contestant")
    add("--new-tokens", type=int, default=64, help="of each answer")
    add("--threads", type=int, default=2, help="of each contestant")
    add("--out", type=Path, metavar="TABLE.md", help="the page")
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace, words: Sequence[str]) -> int:
    settings = race.Settings(options.model, options.llama_cpp, options.rounds, options.new_tokens, options.threads)
    turns = race.race(settings)
    text = race.page(settings, turns, shlex.join(["python", "-m", "benchmarks", *map(place, words)]))
    if options.out:
        options.out.write_text(text, "utf-8")
    print(text)
    return int(any(turn.error for turn in turns))


if __name__ == "__main__":
    sys.exit(main())
