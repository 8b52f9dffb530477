"""Logs of runs for trackers, without training: the events that a run writes, with random values."""

import random
import time
from pathlib import Path
from typing import Any

from tunesmith.runs.folder import Run
from tunesmith.types import Event

RECIPE = "model: ./model\noptim:\n  lr: 0.0003\nevaluation:\n  every: {every}\n"


def new_run(folder: Path, *, every: int | None = 3) -> Run:
    return Run.create(folder, "support", RECIPE.format(every="null" if every is None else every))


def event(kind: Any, step: int, **values: Any) -> Event:
    return Event(kind, step, time.time(), values, {"seconds": 0.25, "peak_bytes": 1000} if kind == "step" else {})


def opening(steps: int) -> list[Event]:
    data = {"data chats.jsonl": "ab" * 32, "data hf://datasets/owner/name/a.parquet": "cd" * 32}
    identity = {**data, "setting seed": "0"}
    plan = {"model": "./model", "task": "chat", "method": "lora", "steps": steps, "rows": {"train": 9, "held_out": 3}}
    return [
        event("start", 0, model="./model", versions={"torch": "2.13.0"}, identity=identity),
        event("plan", 0, **plan, warnings=["few rows"]),
        evaluation("before", 0, steps),
    ]


def draw(*key: Any) -> float:
    """A number with all its digits, the same for the same key, as losses of a repeated step are."""
    return random.Random(repr(key)).uniform(0, 4)


def evaluation(name: str, step: int, steps: int) -> Event:
    value = draw("eval", step, steps)
    measures = {"loss": {"value": value, "low": value - 0.1, "high": value + 0.1}}
    names = ("a b.jsonl", "a_b.jsonl", "a/b.jsonl", "hf://datasets/é?split=train")
    sources = {name: {"loss": {"value": value / at, "low": None, "high": None}} for at, name in enumerate(names, 1)}
    return event("evaluation", step, name=name, loss=value, rows=3, measures=measures, sources=sources)


def trained(first: int, last: int, steps: int, *, every: int | None = 3) -> list[Event]:
    """Events of steps `first` to `last`, each evaluation after its step."""
    found = []
    for step in range(first, last + 1):
        found.append(
            event(
                "step", step, loss=draw(step), lr=draw("lr", step) / 1e4, grad_norm=draw("norm", step), tokens=77 + step
            )
        )
        if every and step % every == 0 and step < steps:
            found.append(evaluation("step", step, steps))
    return found


def ending(steps: int) -> list[Event]:
    return [evaluation("after", steps, steps), event("note", steps, text="kept: the last step"), event("end", steps)]


def write(run: Run, events: list[Event]) -> None:
    for one in events:
        run.append(one)


def with_results(run: Run) -> Run:
    """Write report and adapter as a finished run has them."""
    for name in ("report.html", "report.md", "report.json"):
        (run.path / name).write_text("{}", "utf-8")
    run.adapter_path.mkdir(exist_ok=True)
    (run.adapter_path / "adapter_model.safetensors").write_bytes(b"\0" * 3000)
    return run
