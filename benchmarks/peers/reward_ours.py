"""A run of task reward on pairs: losses, seconds, and the ids, order and start that TRL takes. Run by itself:

python reward_ours.py JOB.json RESULT.json
"""

from __future__ import annotations

import gc
import json
import statistics
from pathlib import Path
from typing import Any

from given_rows import run

from tunesmith.data.branches import lines_of
from tunesmith.recipe.load import validate
from tunesmith.training import trainer
from tunesmith.training.setup import prepare


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses", "seconds" of each step, "tokens" a step, "accuracy", and "margins" of held-out pairs}."""
    folder = Path(job["folder"])
    recipe = validate({
        "model": job["model"], "task": "reward", "method": "lora", "precision": job["precision"], "device": "cpu",
        "threads": job["threads"], "seed": job["seed"], "reward": {"center": job["center"]},
        "data": {"train": [str(folder / "train.jsonl")], "eval": [str(folder / "test.jsonl")], "bad_rows": "skip"},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["pairs_per_step"], "max_steps": job["steps"], "epochs": 9},
        "evaluation": {"samples": 0, "general": False, "surprising": 0, "max_rows": job["held_out"]},
    })  # fmt: skip
    setup = prepare(recipe, root=folder / "runs", offline=True)
    setup.save_result(folder / "start")
    steps = [[i for rows in setup.sampler.step(step) for i in rows] for step in range(1, job["steps"] + 1)]
    pairs = [_pair(lines_of(setup.store.row(i))) for rows in steps for i in rows]
    held_store = setup.rows.held_store
    hashes = {f"{int(held_store.hashes[i]):016x}": _pair(lines_of(held_store.row(i))) for i in range(len(held_store))}
    del setup
    gc.collect()
    tuned = trainer.train(recipe, root=folder / "runs")
    events = [event for event in tuned.events() if event.kind == "step"]
    after = [json.loads(line) for line in (tuned.path / "evaluation" / "after.jsonl").read_text("utf-8").splitlines()]
    held = [hashes[line["hash"].zfill(16)] for line in after]
    given = {**job, "adapter": str(folder / "start"), "pairs": pairs, "held_out": held, "folder": str(folder / "trl")}
    (folder / "job.json").write_text(json.dumps({**given, "tuned": str(tuned.adapter_path)}), "utf-8")
    return {
        "losses": [event.values["loss"] for event in events],
        "seconds": [event.timing["seconds"] for event in events],
        "tokens": statistics.mean(event.values["tokens"] for event in events),
        "margins": [line["rewards"][0] - line["rewards"][1] for line in after],
    }


def _pair(lines: Any) -> dict[str, list[int]]:
    return {f"{side}_ids": line.ids.tolist() for side, line in zip(("chosen", "rejected"), lines, strict=True)}


if __name__ == "__main__":
    run(train)
