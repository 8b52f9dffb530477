"""Our side of `python -m benchmarks preferences`: the steps alone, and what the peer is to be given.

    python prefer_ours.py GIVEN.json RESULT.json

Writes job.json: the pairs of every step as ids, in order, and the adapter before its first step.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from given_rows import run

from tunesmith.data.branches import lines_of
from tunesmith.recipe.load import validate
from tunesmith.training import trainer
from tunesmith.training.setup import prepare


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses", "seconds" of each step, "reference_seconds" a step, "tokens" a step}."""
    folder = Path(job["folder"])
    recipe = validate({
        "model": job["model"], "task": "prefer", "method": "lora", "precision": job["precision"], "device": "cpu",
        "threads": job["threads"], "seed": job["seed"], "prefer": {"beta": job["beta"]},
        "data": {"train": [str(folder / "train.jsonl")], "eval": [str(folder / "test.jsonl")], "bad_rows": "skip"},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["pairs_per_step"], "max_steps": job["steps"], "epochs": 9},
        "evaluation": {"samples": 0, "general": False, "surprising": 0, "max_rows": 1},
    })  # fmt: skip
    setup = prepare(recipe, root=folder / "runs", offline=True)
    setup.save_result(folder / "start")
    steps = [[i for rows in setup.plan.step(step) for i in rows] for step in range(1, job["steps"] + 1)]
    pairs = [_pair(lines_of(setup.store.row(i))) for rows in steps for i in rows]
    num_rows = len(setup.rows.train_rows) + len(setup.rows.held_rows)
    held = [_pair(lines_of(setup.rows.held_store.row(i))) for i in range(len(setup.rows.held_store))]
    held = held[: job["held_out"]]
    given = {**job, "adapter": str(folder / "start"), "pairs": pairs, "held_out": held, "folder": str(folder / "trl")}
    (folder / "job.json").write_text(json.dumps(given), "utf-8")
    del setup
    gc.collect()
    clock: list[float] = []

    def note(what: str, done: int, total: int) -> None:
        if what == "reference":
            clock.append(time.perf_counter())

    begun = time.perf_counter()
    tuned = trainer.train(recipe, root=folder / "runs", listener=trainer.Listener(on_progress=note))
    events = [event for event in tuned.events() if event.kind == "step"]
    return {
        "losses": [event.values["loss"] for event in events],
        "seconds": [event.timing["seconds"] for event in events],
        "reference_seconds": (clock[-1] - clock[0]) / num_rows * job["pairs_per_step"],
        "run_seconds": time.perf_counter() - begun,
        "tokens": statistics.mean(event.values["tokens"] for event in events),
        "tuned": str(tuned.adapter_path),
    }


def _pair(lines: Any) -> dict[str, list[int]]:
    """Prompt and answers, up to the last token that is learnt."""
    first = min(int(np.flatnonzero(line.trained)[0]) for line in lines)
    ends = [int(np.flatnonzero(line.trained)[-1]) + 1 for line in lines]
    chosen, rejected = (line.ids[first:end].tolist() for line, end in zip(lines, ends, strict=True))
    return {"prompt_ids": lines[0].ids[:first].tolist(), "chosen_ids": chosen, "rejected_ids": rejected}


if __name__ == "__main__":
    run(train)
