"""`python -m benchmarks train`: Tunesmith and its peers train on the same tokens, each in a process of its own.

Rows are rendered once, by Tunesmith; peers get token ids and targets. Each round begins with another contestant. Every
result is a file in the work folder, so that a race that was cut off goes on with what is missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.classify import UnusableError
from benchmarks.measured import ROOT, Child, run_child, versions

OURS = "Tunesmith"
BESIDE = "The other checkout"
SCRIPTS = ROOT / "benchmarks" / "peers"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tool: the script that runs it, in which environment, and what it is given beside the settings."""

    environment: str
    """Name of the folder with its virtual environment, as `benchmarks.environments` makes it."""
    script: str
    arguments: Mapping[str, Any]


PEERS: Mapping[str, Peer] = {
    "TRL, as shipped": Peer("trl", "trl_train.py", {}),
    "TRL, tuned": Peer(
        "trl",
        "trl_train.py",
        {
            "model_init_kwargs": {"dtype": "bfloat16"},
            "gradient_checkpointing": False,
            "optim": "adamw_torch_fused",
            "train_sampling_strategy": "group_by_length",
        },
    ),
    "LLaMA-Factory, as shipped": Peer(
        "llamafactory", "llamafactory_train.py", {"per_device_train_batch_size": 1, "bf16": True}
    ),
    "LLaMA-Factory, tuned": Peer(
        "llamafactory",
        "llamafactory_train.py",
        {
            "per_device_train_batch_size": 8,
            "bf16": True,
            "disable_gradient_checkpointing": True,
            "train_sampling_strategy": "group_by_length",
        },
    ),
    "LitGPT, as shipped": Peer("litgpt", "litgpt_train.py", {}),
    "LitGPT, tuned": Peer("litgpt", "litgpt_train.py", {"precision": "bf16-true", "train.micro_batch_size": 4}),
}
"""Arguments of each are those of its configuration, by the names of its own documentation."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every contestant is given. A work folder holds results of one such set for each of its names."""

    model: str
    rows: str
    """Name of the rows: a folder of the work folder, made by `benchmarks.rows`."""
    method: str
    """lora or full."""
    rank: int
    alpha: int
    lr: float
    """Peak; linear to zero, no warm-up, no weight decay, gradients clipped at norm 1."""
    rows_per_step: int
    steps: int
    threads: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One process of one contestant."""

    name: str
    round: int
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    arguments: Mapping[str, Any]
    child: Mapping[str, Any]
    error: str = ""
    tokens_per_second: float = 0.0
    """Of real tokens, padding left out, from the end of the warm-up to the end of the last step."""
    targets_per_second: float = 0.0
    first_step_seconds: float = 0.0
    """From the start of the process to the end of its first step."""
    losses: Sequence[float] = ()
    """Of each step, per target, as the contestant says it."""
    result: str = ""
    """Where it saved what it trained."""
    share: float | None = None
    """Ours, of the limit of its matrix products alone, which are measured right after it: `benchmarks/step.py`."""
    held_out: float | None = None
    """Loss per target of that on the held-out rows, by `peers/held_out.py`, the same for all."""


@dataclass(frozen=True, slots=True)
class Log:
    """When steps ended, in seconds since the epoch, and what each of them held."""

    step_ends: Sequence[float]
    tokens: Sequence[int]
    targets: Sequence[int]
    losses: Sequence[float]
    result: str
    versions: Mapping[str, str]

    def rates(self) -> tuple[float, float]:
        """Tokens and targets a second. Warm-up: the first half of the steps, ten at most."""
        warm = min(10, len(self.step_ends) // 2)
        if not warm or len(self.step_ends) != len(self.tokens):
            raise ValueError(f"{len(self.step_ends)} steps ended, and {len(self.tokens)} had tokens: 2 are needed")
        seconds = self.step_ends[-1] - self.step_ends[warm - 1]
        return sum(self.tokens[warm:]) / seconds, sum(self.targets[warm:]) / seconds


@dataclass(frozen=True, slots=True)
class Race:
    """Who runs, how often, and where results are kept."""

    work: Path
    environments: Path
    peers: Sequence[str]
    rounds: int
    until: float = float("inf")
    """time.monotonic() at which no new turn is begun."""
    beside: str | None = None
    """Interpreter of another checkout of Tunesmith, which is a contestant then."""

    @property
    def names(self) -> list[str]:
        """All contestants."""
        return [OURS, *([BESIDE] if self.beside else []), *self.peers]

    def turns(self, settings: Settings) -> Iterator[Turn]:
        """Every turn, those from before read from their files. UnusableError: those had other settings."""
        names = self.names
        for number in range(self.rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                path = self.path(settings, name, number)
                if path.exists():
                    yield _read(path, settings)
                elif time.monotonic() < self.until:
                    turn = self._run(settings, name, number)
                    write(path, turn)
                    yield turn

    def path(self, settings: Settings, name: str, number: int) -> Path:
        slug = name.lower().replace(", ", "-").replace(" ", "-")
        return self.work / "turns" / f"{settings.rows}-{settings.method}-{slug}-{number}.json"

    def _run(self, settings: Settings, name: str, number: int) -> Turn:
        folder = self.path(settings, name, number).with_suffix("")
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.work / "rows" / settings.rows
        begun = time.time()
        if name in (OURS, BESIDE):
            run, arguments, found = folder / f"run-{int(begun)}", {}, versions() if name == OURS else {}
            python = sys.executable if name == OURS else str(self.beside)
            words = [python, "-m", "tunesmith", *train_words(settings, self.work, run, seed=number)]
            child = run_child(words, log=folder / "log", settings=None if name == OURS else {"PYTHONPATH": ""})
        else:
            peer = PEERS[name]
            job, run, arguments, found = folder / "job.json", folder / "told.json", peer.arguments, {}
            fields = {**asdict(settings), "seed": number, "arguments": dict(peer.arguments), "folder": str(folder)}
            job.write_text(json.dumps({**fields, "rows": str(rows / "rows.json")}), "utf-8")
            python = str(self.environments / peer.environment / "bin" / "python")
            words = [python, str(SCRIPTS / peer.script), str(job), str(run)]
            child = run_child(words, log=folder / "log")
        turn = told(Turn(name, number, asdict(settings), found, arguments, asdict(child)), child, run, begun)
        return replace(turn, share=_share(run, folder)) if name == OURS and not turn.error else turn


def _share(run: Path, folder: Path) -> float | None:
    child = run_child([sys.executable, "-m", "benchmarks", "limit", str(run)], log=folder / "limit.log")
    return None if child.code else float(child.tail.splitlines()[-1])


def told(turn: Turn, child: Child, path: Path, begun: float) -> Turn:
    """`turn` with what its process left at `path`, or with why it cannot be used."""
    fields = asdict(turn)
    if child.code:
        return Turn(**{**fields, "error": f"exit code {child.code}\n{child.tail}"})
    try:
        log = read_run(path) if turn.name in (OURS, BESIDE) else Log(**json.loads(path.read_text("utf-8")))
        tokens, targets = log.rates()
    except (OSError, ValueError, LookupError, TypeError) as error:
        return Turn(**{**fields, "error": f"what it left cannot be used: {type(error).__name__}: {error}"})
    fields |= {"tokens_per_second": tokens, "targets_per_second": targets, "losses": list(log.losses)}
    fields |= {"versions": {**turn.versions, **log.versions}, "first_step_seconds": log.step_ends[0] - begun}
    return Turn(**{**fields, "result": log.result})


def train_words(settings: Settings, work: Path, run: Path, *, seed: int) -> list[str]:
    """Words of `tunesmith train`: of what it does beside training, no more than it has to."""
    rows = work / "rows" / settings.rows
    given = {
        "seed": seed,
        "threads": settings.threads,
        "train.epochs": 1,
        "train.rows_per_step": settings.rows_per_step,
        "optim.lr": settings.lr,
        "optim.warmup": 0,
        "evaluation.max_rows": 1,
        "evaluation.samples": 0,
        "evaluation.general": "false",
        "evaluation.surprising": 0,
        "checkpoint.every": 10**6,
    }
    if settings.method == "lora":
        given |= {"method.rank": settings.rank, "method.alpha": settings.alpha}
    files = [str(rows / "train.jsonl"), "--eval", str(rows / "eval.jsonl")]
    words = ["train", settings.model, *files, "--method", settings.method, "--runs", str(work / "ours")]
    words += ["--out", str(run), "--quiet"]
    for name, value in given.items():
        words += ["--set", f"{name}={value}"]
    return words


def read_run(run: Path) -> Log:
    """Of Tunesmith's run folder; docs/guide/runs.md says what is in it."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    steps = [event for event in events if event["kind"] == "step"]
    saved = next(folder for folder in (run / "adapter", run / "model") if folder.is_dir())
    values = [step["values"] for step in steps]
    return Log(
        [step["time"] for step in steps],
        *([value[name] for value in values] for name in ("tokens", "targets", "loss")),
        result=str(saved),
        versions={},
    )


def measure_held_out(race: Race, settings: Settings) -> None:
    """Add the held-out loss to every result that lacks it."""
    for name in race.names:
        for number in range(race.rounds):
            path = race.path(settings, name, number)
            turn = _read(path, settings) if path.exists() else None
            if turn is None or turn.error or turn.held_out is not None:
                continue
            rows = race.work / "rows" / settings.rows / "rows.json"
            words = [sys.executable, str(SCRIPTS / "held_out.py"), settings.model, turn.result, str(rows)]
            child = run_child(words, log=path.with_suffix(".held-out.log"))
            fields = asdict(turn)
            if child.code:
                fields["error"] = f"its result cannot be measured: {child.tail}"
            else:
                fields["held_out"] = float(child.tail.splitlines()[-1])
            write(path, Turn(**fields))


def write(path: Path, turn: Turn) -> None:
    """The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(turn), indent=1), "utf-8")
    temporary.replace(path)


def _read(path: Path, settings: Settings) -> Turn:
    turn = Turn(**json.loads(path.read_text("utf-8")))
    if dict(turn.settings) != asdict(settings):
        raise UnusableError(f"{path}: a result with other settings. Give another --work, or remove it.")
    return turn
