"""What steps cost for `python -m benchmarks images --cost`.

python images_cost.py JOB.json RESULT.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from given_rows import run

from tunesmith.environment.settings import prepare_environment


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"losses", "seconds" of each step, "steps_per_epoch", "tokens" of a row}. Way `anew`: no vector of
    an image finds room."""
    prepare_environment(os.environ)  # as the command line does for its runs
    from tunesmith.models import image_features
    from tunesmith.recipe.load import validate
    from tunesmith.training import trainer

    if job["way"] == "anew":
        image_features.MEMORY_SHARE = 0
    recipe = validate({
        "model": job["model"], "task": "chat", "method": "lora", "precision": job["precision"], "device": "cpu",
        "threads": job["threads"], "data": {"train": [job["rows"]]},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["rows_per_step"], "max_steps": job["steps"], "epochs": 99},
        "evaluation": {"samples": 0, "general": False, "surprising": 0, "max_rows": 1},
    })  # fmt: skip
    tuned = trainer.train(recipe, root=Path(job["folder"]) / "runs", offline=True)
    events = list(tuned.events())
    steps = [event for event in events if event.kind == "step"]
    (plan,) = [event.values for event in events if event.kind == "plan"]
    return {
        "losses": [event.values["loss"] for event in steps],
        "seconds": [event.timing["seconds"] for event in steps],
        "steps_per_epoch": plan["steps_per_epoch"],
        "tokens": plan["longest_row"],
    }


if __name__ == "__main__":
    run(train)
