"""`python -m benchmarks methods`: each method on the same rows for as many steps: what it learns, forgets and costs."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measured import machine, run_child, versions

WARM_UP_STEPS = 8
RESULTS = ("adapter", "model")
"""Folders of a run that hold what it made."""
CASES: Mapping[str, Mapping[str, Any]] = {
    "full": {"name": "full"},
    "lora, attention": {"name": "lora", "targets": ["attention"]},
    "lora, mlp": {"name": "lora", "targets": ["mlp"]},
    "lora, all-linear": {"name": "lora"},
    "rslora, rank 64": {"name": "lora", "rank": 64, "alpha": 16, "rslora": True},
    "dora": {"name": "dora"},
    "qlora": {"name": "qlora"},
    "peft: IA3": {"name": "peft", "kind": "IA3"},
}
"""What is set of each method; the rest, its rate too, is what Tunesmith decides by itself."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every case is given."""

    model: str
    steps: Mapping[str, int]
    """Updates on each data set."""
    rows_per_step: int
    data: Mapping[str, tuple[str, str]]
    """Training and test file of each data set."""
    extra: Sequence[str] = ()
    """Any other option of a recipe, as OPTION=VALUE."""


@dataclass(frozen=True, slots=True)
class Result:
    """One case on one data set."""

    data: str
    case: str
    rate: float = 0.0
    trained: int = 0
    """Numbers that are trained."""
    result_bytes: int = 0
    """Size of the tensors that it leaves."""
    peak_bytes: int = 0
    tokens_per_second: float = 0.0
    """After the first steps, from step to step."""
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    general: tuple[float, float] | None = None
    """Loss on general text before and after."""
    load: float = 0.0
    """Processes that wanted to run in the minute before."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def run_all(settings: Settings, folder: Path, *, only: Sequence[str], minutes: float | None) -> list[Result]:
    """Every case that `folder` has no result of yet, each in a new process, as many as begin within `minutes`; those
    that it has, too."""
    begun, slowest = time.monotonic(), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for data in settings.data:
        for case in CASES:
            name = _name(data, case)
            place = folder / f"{name}.json"
            if place.exists():
                results.append(_read_result(place))
                continue
            left = None if minutes is None else minutes * 60 - (time.monotonic() - begun)
            if (only and case not in only) or (left is not None and left < slowest):
                continue
            one = time.monotonic()
            result = _run(settings, data, case, folder, name)
            slowest = max(slowest, time.monotonic() - one)
            print(f"{data}, {case}: {result.error or _line(result)}", file=sys.stderr, flush=True)
            if not result.error:
                place.write_text(json.dumps(asdict(result), indent=2) + "\n", "utf-8")
            results.append(result)
    return results


def with_speed_of(results: Sequence[Result], folder: Path) -> list[Result]:
    """The same results with the tokens/s that `folder` has, and the load before them; 0 where it has none."""
    found = []
    for result in results:
        place = folder / f"{_name(result.data, result.case)}.json"
        timed = _read_result(place) if place.exists() else replace(result, tokens_per_second=0.0)
        found.append(replace(result, tokens_per_second=timed.tokens_per_second, load=timed.load))
    return found


def _read_result(place: Path) -> Result:
    return Result(**json.loads(place.read_text("utf-8")))


def _name(data: str, case: str) -> str:
    return f"{data}-{case.replace(', ', '-').replace(': ', '-').replace(' ', '-')}"


def _line(result: Result) -> str:
    measures = ", ".join(f"{name} {value:.4f}" for name, value in result.after.items())
    return f"{measures}, {result.tokens_per_second:,.0f} tokens/s, {result.peak_bytes / 2**30:.2f} GiB"


def _run(settings: Settings, data: str, case: str, folder: Path, name: str) -> Result:
    train, test = settings.data[data]
    out = folder / f"{name}-run"
    shutil.rmtree(out, ignore_errors=True)
    options = {
        **{f"method.{key}": value for key, value in CASES[case].items()},
        "train.max_steps": settings.steps[data],
        "train.rows_per_step": settings.rows_per_step,
        "evaluation.samples": 0,
        "evaluation.surprising": 0,
        "checkpoint.every": settings.steps[data],
        "checkpoint.keep": 1,
    }
    words = [sys.executable, "-m", "tunesmith", "train", settings.model, train, "--eval", test, "--json"]
    words += ["--out", str(out), "--runs", str(folder), "--offline"]
    for key, value in options.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    for setting in settings.extra:
        words += ["--set", setting]
    log = folder / f"{name}-log.txt"
    child = run_child(words, log=log)
    if child.code != 0:
        return Result(data, case, error=f"exit code {child.code}: {child.tail[-600:]}")
    try:
        return _read(out, data, case, peak_bytes=child.peak_bytes, load=child.load_before)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _read(out: Path, data: str, case: str, *, peak_bytes: int, load: float) -> Result:
    """What a run left."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text("utf-8").splitlines()]
    plan = next(event["values"] for event in events if event["kind"] == "plan")
    looks = {event["values"]["name"]: event["values"] for event in events if event["kind"] == "evaluation"}
    general = {event["values"]["name"]: event["values"]["loss"] for event in events if event["kind"] == "general"}
    steps = [event for event in events if event["kind"] == "step"][WARM_UP_STEPS:]
    rate = next((choice["value"] for choice in plan["choices"] if choice["key"] == "optim.lr"), 0.0)
    return Result(
        data=data,
        case=case,
        rate=float(rate),
        trained=plan["trained_parameters"],
        result_bytes=sum(path.stat().st_size for path in out.glob("*/*.safetensors") if path.parent.name in RESULTS),
        peak_bytes=peak_bytes,
        tokens_per_second=_sum(steps, "values", "tokens") / _sum(steps, "timing", "seconds"),
        before=_measures(looks["before"]),
        after=_measures(looks["after"]),
        general=(general["before"], general["after"]) if general else None,
        load=load,
        machine=machine(),
        versions=versions(),
    )


def _sum(steps: Sequence[Mapping[str, Any]], part: str, name: str) -> float:
    return float(sum(event[part][name] for event in steps))


def _measures(look: Mapping[str, Any]) -> dict[str, float]:
    kept = ("loss", "token_accuracy", "accuracy", "macro_f1")
    return {name: look["measures"][name]["value"] for name in kept if name in look["measures"]}
