"""`python -m benchmarks classify`: Tunesmith and `transformers.Trainer` trained on the same rows, seed by seed."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measured import ROOT, Child, run_child
from benchmarks.results import Result, Timing, scored

Rows = list[dict[str, str]]
Say = Callable[[str], None]
OURS = "Tunesmith"
PEERS: Mapping[str, Mapping[str, Any]] = {
    "Trainer, as shipped": {},
    "Trainer, tuned": {"train_sampling_strategy": "group_by_length", "bf16": True, "save_strategy": "no"},
}
"""Arguments of each beside the settings that all share; README.md says what else was tried."""


class UnusableError(Exception):
    """The command asks for what cannot be compared."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every contestant is given."""

    model: str
    train: str
    eval: str
    epochs: float
    rows_per_step: int
    lr: float
    warmup: float
    """Below 1 a share of all steps, from 1 up a number of steps."""
    weight_decay: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a child left behind: classes of the test rows in their order, and when its steps ended."""

    predicted: list[str]
    timing: Timing
    facts: Mapping[str, Any]
    """What it chose by itself: precision of the weights and threads."""


def contests(
    settings: Settings, *, seeds: Sequence[int], method: str, peers: Sequence[str], extra: Sequence[str], folder: Path
) -> list[Callable[[], Result]]:
    """One call a contestant and seed. Each seed begins with another contestant, so that none is always first."""
    labels = [row["label"] for row in read_rows(settings.eval)]

    def ours(seed: int) -> Callable[[], Result]:
        run = folder / f"tunesmith-{seed}"
        words = [sys.executable, "-m", "tunesmith", *train_words(settings, run, seed=seed, method=method, extra=extra)]
        return lambda: result(
            OURS, seed, run_child(words, log=run.with_suffix(".log")), lambda: read_run(run, labels), labels
        )

    def peer(name: str, seed: int) -> Callable[[], Result]:
        job, answer = (
            folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}{end}" for end in ("", ".answer.json")
        )
        fields = {**asdict(settings), "seed": seed, "folder": str(job), "arguments": dict(PEERS[name])}
        job.with_suffix(".json").write_text(json.dumps(fields), "utf-8")
        script = ROOT / "benchmarks" / "peers" / "trainer_classify.py"
        words = [sys.executable, str(script), str(job.with_suffix(".json")), str(answer)]
        return lambda: result(
            name, seed, run_child(words, log=job.with_suffix(".log")), lambda: read_peer(answer), labels
        )

    calls = []
    for turn, seed in enumerate(seeds):
        of_seed = [ours(seed), *(peer(name, seed) for name in peers)]
        first = turn % len(of_seed)
        calls += of_seed[first:] + of_seed[:first]
    return calls


def train_words(settings: Settings, run: Path, *, seed: int, method: str, extra: Sequence[str]) -> list[str]:
    """Words of `tunesmith train`; the settings in `extra` count more."""
    given = {
        "seed": seed,
        "train.epochs": settings.epochs,
        "train.rows_per_step": settings.rows_per_step,
        "optim.lr": settings.lr,
        "optim.schedule": "linear",
        "optim.warmup": settings.warmup,
        "optim.weight_decay": settings.weight_decay,
        "data.max_tokens": settings.max_tokens,
        "evaluation.max_rows": "null",
    }
    words = ["train", settings.model, settings.train, "--eval", settings.eval, "--task", "classify"]
    words += ["--method", method, "--out", str(run), "--quiet"]
    for setting in [*(f"{name}={value}" for name, value in given.items()), *extra]:
        words += ["--set", setting]
    return words


def result(name: str, seed: int, child: Child, read: Callable[[], Answer], labels: list[str]) -> Result:
    """Scores and times of a child, or why it has none."""
    if child.code:
        return Result(name, seed, child, error=f"exit code {child.code}\n{child.tail}")
    try:
        answer = read()
        return Result(name, seed, child, scored(labels, answer.predicted), answer.timing, answer.facts)
    except (OSError, ValueError, LookupError) as error:
        return Result(name, seed, child, error=f"what it left cannot be used: {type(error).__name__}: {error}")


def read_peer(path: Path) -> Answer:
    fields = json.loads(path.read_text("utf-8"))
    timing = Timing.of(fields["begun"], fields["step_ends"], fields["step_rows"])
    return Answer(fields["predicted"], timing, fields["facts"])


def read_run(run: Path, labels: Sequence[str]) -> Answer:
    """Of Tunesmith's run folder; described in docs/guide/runs.md. ValueError: it measured other rows than these."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    begun = steps[0]["time"] - steps[0]["timing"]["seconds"]
    timing = Timing.of(begun, [step["time"] for step in steps], [len(step["values"]["rows"]) for step in steps])
    lines = [json.loads(line) for line in (run / "evaluation" / "after.jsonl").read_text("utf-8").splitlines()]
    lines.sort(key=lambda line: int(line["source"].rsplit(":", 1)[1]))
    if [line["label"] for line in lines] != list(labels):
        raise ValueError(f"it measured {len(lines)} rows, and they are not the {len(labels)} rows of the test file")
    report = json.loads((run / "report.json").read_text("utf-8"))
    facts = {name: report[name] for name in ("precision", "threads")}
    return Answer([line["predicted"] for line in lines], timing, facts)


def read_rows(path: str) -> Rows:
    """Rows of a CSV file with the columns text and label."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if not {"text", "label"} <= set(reader.fieldnames or ()):
            raise UnusableError(
                f"{path}: columns {reader.fieldnames}: a CSV file with the columns text and label is needed"
            )
        return list(reader)


def cut_rows(settings: Settings, max_rows: int, folder: Path) -> Settings:
    """With files of the first rows only; test rows whose label was cut away are left out."""
    train = read_rows(settings.train)[:max_rows]
    known = {row["label"] for row in train}
    test = [row for row in read_rows(settings.eval) if row["label"] in known][:max_rows]
    return replace(settings, train=_written(train, folder / "train.csv"), eval=_written(test, folder / "eval.csv"))


def _written(rows: Rows, path: Path) -> str:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
