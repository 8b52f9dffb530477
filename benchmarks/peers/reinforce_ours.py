"""Our side of `python -m benchmarks reinforce`: one step's losses, or a run.

python reinforce_ours.py JOB.json RESULT.json
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from given_rows import run
from reinforce_start import recipe_of, save_base

from tunesmith.environment.settings import prepare_environment

STEPS_BEFORE, MOVED = 2, 0.3
"""Steps that move the adapter before the losses are compared, and how far π_old is from the learner, in nats."""


def main(job: dict[str, Any]) -> dict[str, Any]:
    prepare_environment(os.environ)  # as the command line does for its runs
    return _train(job) if job.get("beside") else _losses(job)


def _losses(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"settings": loss of each and the share of clipped tokens, "answers"}; answers and adapter for TRL
    are in answers.json and adapter, gradients in ours-N.safetensors."""
    import json

    import numpy as np
    from safetensors.torch import save_file

    from tunesmith.tasks.policy_losses import policy_loss_sum
    from tunesmith.training.draw import Drawing
    from tunesmith.training.loop import training_steps
    from tunesmith.training.setup import prepare
    from tunesmith.training.step import compute_gradients

    folder, recipe = Path(job["folder"]), recipe_of({**job, "steps": STEPS_BEFORE + 1, "lr": 1e-3})
    save_base(job["model"], folder / "base")
    setup = prepare(recipe, root=folder / "runs", offline=True)
    drawing = setup.drawing
    assert isinstance(drawing, Drawing), "task reinforce"
    for _ in zip(range(STEPS_BEFORE), training_steps(setup), strict=False):
        pass
    setup.save_result(folder / "adapter")
    (groups,), _ = drawing.groups_of(setup, [STEPS_BEFORE + 1])
    drawing.close()
    worth = {(id(group), i): advantage for group, i, advantage in drawing._counted(groups)}
    answers = [
        {
            "prompt_ids": setup.store.row(group.row).ids.tolist(),
            "completion_ids": list(answer.ids),
            "advantage": worth[id(group), i],
            "moved": _moves(answer.ids),
        }
        for group in groups
        for i, answer in enumerate(group.answers)
    ]
    (folder / "answers.json").write_text(json.dumps({"answers": answers, "base": str(folder / "base")}), "utf-8")
    found = []
    for number, setting in enumerate(job["settings"]):
        options = recipe.reinforce.model_copy(
            update={key: setting[key] for key in ("loss", "normalize", "kl")} | {"correct": None}
        )
        drawing.recipe = recipe.model_copy(update={"reinforce": options})
        plain = drawing._learnt(setup, groups)
        old = drawing.measured(plain) if setting["moved"] else ()
        learnt = [plain.store.row(row) for row in range(len(old))]
        moves = [_moves(row.ids[row.trained].tolist()) for row in learnt]
        old = [logps_N + np.float32(move) for logps_N, move in zip(old, moves, strict=True)]
        seen: dict[int, Any] = {}
        loss_sum = partial(policy_loss_sum, options=options, output=drawing.output, seen=seen)
        view = drawing.view(setup, groups, old)
        view = replace(view, task=replace(view.task, loss_sum=loss_sum))
        setup.optimizer.zero_grad()
        done = compute_gradients(view, view.sampler, 1)
        grads = {
            name.replace(".weight", ""): tensor.grad.float().contiguous()
            for name, tensor in setup.attachment.trained.items()
            if tensor.grad is not None
        }
        save_file(grads, folder / f"ours-{number}.safetensors")
        sums = sum(row.double() for row in seen.values())
        found.append({
            "loss": sum(done.computed.losses) / done.num_targets, "clipped": float((sums[4] + sums[5]) / sums[0]),
        })  # fmt: skip
    lengths = [len(answer["completion_ids"]) for answer in answers]
    return {"settings": found, "answers": {"answers": len(answers), "tokens": sum(lengths)}}


def _moves(ids: Sequence[int]) -> list[float]:
    """How far π_old is from the learner at each token of an answer."""
    import numpy as np

    return np.random.default_rng(list(ids)).uniform(-MOVED, MOVED, len(ids)).tolist()


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"seconds" and "rewards" of each step, "adapter"}."""
    from tunesmith.training import trainer

    folder = Path(job["folder"])
    # The judge measures the held-out prompts of both sides; the run itself measures few.
    tuned = trainer.train(recipe_of(job, held_rows=4), root=folder / "runs", out=folder / f"run-{job['name']}")
    steps = [event for event in tuned.events() if event.kind == "step"]
    return {
        "seconds": [event.timing["seconds"] for event in steps],
        "rewards": [event.values["reward"] for event in steps],
        "adapter": str(tuned.adapter_path),
    }


if __name__ == "__main__":
    run(main)
