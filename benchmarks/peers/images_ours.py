"""Our side of `python -m benchmarks images --beside trl`.

python images_ours.py JOB.json RESULT.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from given_rows import run

from tunesmith.environment.settings import prepare_environment

PARTS = ("language", "projector", "vision")


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses" of each step, "order": lines of its rows, one after another, "ids": tokens of a line}."""
    prepare_environment(os.environ)  # as the command line does for its runs
    from tunesmith.recipe.load import validate
    from tunesmith.training import trainer
    from tunesmith.training.setup import prepare

    root = Path(job["folder"]) / "runs"
    recipe = validate({
        "model": job["model"], "task": "chat", "method": {"name": "full", "train": PARTS}, "precision": "float32",
        "device": "cpu", "threads": job["threads"], "data": {"train": [job["rows"]], "eval": [job["rows"]]},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["rows_per_step"], "max_steps": job["steps"], "epochs": 99},
        "evaluation": {"samples": 0, "general": False, "surprising": 0, "max_rows": 1},
    })  # fmt: skip
    setup = prepare(recipe, root=root, offline=True)
    lines, store, num_rows = setup.store.lines, setup.store, len(setup.rows.train_rows)
    if num_rows % job["rows_per_step"]:
        raise ValueError(f"{num_rows} rows are no whole steps of {job['rows_per_step']}: TRL ends no epoch with fewer")
    order = [int(lines[i]) for step in range(1, job["steps"] + 1) for i in setup.sampler.rows(step)]
    ids = {int(lines[i]): store.row(i).ids[: _end(store.row(i))].tolist() for i in range(len(store))}
    tuned = trainer.train(recipe, root=root, offline=True)
    losses = [event.values["loss"] for event in tuned.events() if event.kind == "step"]
    return {"losses": losses, "order": order, "ids": ids}


def _end(row: Any) -> int:
    """Behind the last token that is learnt."""
    return int(row.trained.nonzero()[0][-1]) + 1


if __name__ == "__main__":
    run(train)
