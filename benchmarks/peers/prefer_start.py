"""What both sides of `python -m benchmarks preferences` begin with.

    python prefer_start.py GIVEN.json RESULT.json

Writes job.json: the pairs of every step as ids, in order, and the adapter before its first step. A process of its own,
whose memory is nobody's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from given_rows import run

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


def recipe_of(job: dict[str, Any]) -> Recipe:
    """What is trained."""
    from tunesmith.recipe.load import validate

    folder = Path(job["folder"])
    return validate({
        "model": job["model"], "task": "prefer", "method": "lora", "precision": job["precision"], "device": "cpu",
        "threads": job["threads"], "seed": job["seed"], "prefer": {"beta": job["beta"]},
        "data": {"train": [str(folder / "train.jsonl")], "eval": [str(folder / "test.jsonl")], "bad_rows": "skip"},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["pairs_per_step"], "max_steps": job["steps"], "epochs": 9,
                  "tokens_per_pass": job["tokens_per_pass"]},
        "evaluation": {"samples": 0, "general": False, "surprising": 0, "max_rows": 1},
    })  # fmt: skip


def start(job: dict[str, Any]) -> dict[str, Any]:
    """Write the adapter and job.json; RESULT.json has nothing to say."""
    from tunesmith.data.branches import lines_of
    from tunesmith.training.setup import prepare

    folder = Path(job["folder"])
    setup = prepare(recipe_of(job), root=folder / "start-runs", offline=True)
    setup.save_result(folder / "start")
    steps = [[i for rows in setup.sampler.step(step) for i in rows] for step in range(1, job["steps"] + 1)]
    pairs = [_pair(lines_of(setup.store.row(i))) for rows in steps for i in rows]
    held = [_pair(lines_of(setup.rows.held_store.row(i))) for i in range(len(setup.rows.held_store))]
    held = held[: job["held_out"]]
    given = {**job, "adapter": str(folder / "start"), "pairs": pairs, "held_out": held, "folder": str(folder / "trl")}
    (folder / "job.json").write_text(json.dumps(given), "utf-8")
    return {}


def _pair(lines: Any) -> dict[str, list[int]]:
    """Prompt and answers, up to the last token that is learnt."""
    import numpy as np

    first = min(int(np.flatnonzero(line.trained)[0]) for line in lines)
    ends = [int(np.flatnonzero(line.trained)[-1]) + 1 for line in lines]
    chosen, rejected = (line.ids[first:end].tolist() for line, end in zip(lines, ends, strict=True))
    return {"prompt_ids": lines[0].ids[:first].tolist(), "chosen_ids": chosen, "rejected_ids": rejected}


if __name__ == "__main__":
    run(start)
