"""What a plan foresees of a run with images, and what it takes, for `python -m benchmarks images --foreseen`.

python images_foreseen.py JOB.json RESULT.json
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from given_rows import run

from tunesmith.environment.settings import prepare_environment


def compare(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: seconds of a mean step and of a picture's pass through a frozen tower, as `formula`, `probe` and
    `measured`; a tower that learns is part of the step."""
    prepare_environment(os.environ)  # as the command line does for its runs
    from tunesmith.models.image_features import kept_vectors
    from tunesmith.recipe.load import validate
    from tunesmith.training.loop import training_steps
    from tunesmith.training.probe import probe
    from tunesmith.training.resolve import resolve_run
    from tunesmith.training.setup import prepare

    root = Path(job["folder"]) / "runs"
    parts = {"train": ["language", "projector", "vision"]} if job["method"] == "full" else {}
    recipe = validate({
        "model": job["model"], "task": "chat", "method": {"name": job["method"], **parts}, "device": "cpu",
        "precision": job["precision"], "threads": job["threads"], "data": {"train": [job["rows"]]},
        "optim": {"lr": job["lr"]},
        "train": {"rows_per_step": job["rows_per_step"], "max_steps": job["steps"], "epochs": 99},
        "evaluation": {"samples": 0, "general": False, "surprising": 0},
    })  # fmt: skip
    plan = resolve_run(recipe, root=root)
    assert plan.forecast is not None, plan.notes
    assert plan.forecast.duration is not None
    sampler = plan.forecast.sampler
    mean_tokens = float(sampler.lengths_I @ sampler.weights_I) / sampler.steps_per_epoch
    tried = probe(plan.recipe, root=root, offline=True, on_progress=lambda what, done, total: None)
    after = tried.duration(plan.forecast, mean_tokens)
    assert after is not None, tried.ended
    setup = prepare(recipe, root=root)
    vectors, seeing, steps = kept_vectors(setup.model), 0.0, []
    for event in training_steps(setup):
        steps.append((event.timing["seconds"] - (vectors.seconds - seeing), event.values["tokens"]))
        seeing = vectors.seconds
    settled = steps[1:]
    seconds = statistics.median(taken * mean_tokens / tokens for taken, tokens in settled)
    found = {"step": {"measured": seconds}}
    if vectors.seconds:
        found["picture"] = {"measured": vectors.seconds / vectors.computed}
    for way, duration in (("formula", plan.forecast.duration), ("probe", after)):
        found["step"][way] = duration.prices["training"]
        if "picture" in found:
            found["picture"][way] = duration.prices["seeing"]
    return {"foreseen": found, "tokens": mean_tokens, "layout": setup.sampler.layout}


if __name__ == "__main__":
    run(compare)
