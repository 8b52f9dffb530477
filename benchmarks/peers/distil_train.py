"""One way of `python -m benchmarks distil`: answers alone, a teacher's probabilities at them, or at the model's own.

python distil_train.py JOB.json RESULT.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from distil_start import recipe_of
from given_rows import run


def train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"run": its folder, "seconds" and "losses" of each step}."""
    from tunesmith.environment.settings import prepare_environment
    from tunesmith.training import trainer

    prepare_environment(os.environ)
    folder = Path(job["folder"])
    tuned = trainer.train(recipe_of(job, job["way"]), root=folder / "runs", out=folder / f"run-{job['way']}")
    steps = [event for event in tuned.events() if event.kind == "step"]
    return {
        "run": str(tuned.path),
        "seconds": [event.timing["seconds"] for event in steps],
        "losses": [event.values["loss"] for event in steps],
    }


if __name__ == "__main__":
    run(train)
