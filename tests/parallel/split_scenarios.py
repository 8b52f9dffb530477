"""What one rank of a group with split layers does; `test_split.py` compares what the ranks found.

A name that ends in `_planted` is the same with a bug, for a test to see.
"""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule

from parallel.scenarios import IN_PARTS, QUIET, steps_of, together_as, write_alike
from parallel.scenarios import alike as whole_alike
from parallel.scenarios import recipe_of as whole_recipe_of
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import tiny_recipe
from tunesmith.data.sampler import StepSampler
from tunesmith.parallel import fsdp, world
from tunesmith.recipe.schema import Recipe
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run
from tunesmith.training import step, trainer
from tunesmith.training.trainer import resume, train

LOOKS = {"samples": 9, "sample_tokens": 2, "surprising": 8, "every": 4, "general": False}
KILLED_AT = 4


def make_inputs(folder: Path) -> None:
    """Twenty chats, and a model of two layers that hold five sixths of its weights."""
    recipe = tiny_recipe(folder, rows=20, optim={"lr": 1e-3}, train=IN_PARTS, **QUIET)
    tiny_model(vocab_size=len(tiny_tokenizer()), intermediate_size=768).save_pretrained(recipe.model)
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json")))
    write_alike(folder / "alike.jsonl")


def recipe_of(folder: Path, method: str = "lora", **sections: Any) -> Recipe:
    return whole_recipe_of(folder, method, **sections).model_copy(update={"shard": True})


def run_recipe(folder: Path, method: str, **sections: Any) -> Recipe:
    sections |= {"evaluation": LOOKS, "checkpoint": {"every": 2, "keep": 9}}
    return whole_recipe_of(folder, method, **sections)


def steps(folder: Path, method: str, **sections: Any) -> dict[str, Any]:
    idle: list[int] = []
    right = StepSampler.idle

    def counted(plan: StepSampler, number: int) -> Any:
        found = right(plan, number)
        idle.append(len(found))
        return found

    with together_as(recipe_of(folder, method, **sections), folder) as made, patch.object(StepSampler, "idle", counted):
        base = {name: p for name, p in made.model.named_parameters() if "lora_" not in name}
        own = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in base.values())
        share = own / sum(p.numel() for p in base.values())
        trained = sum(tensor.numel() for tensor in made.attachment.trained.values()) / made.attachment.num_trained
        return {**steps_of(made), "share": share, "trained": trained, "idle": sum(idle)}


def lora(folder: Path) -> Any:
    return steps(folder, "lora")


def full(folder: Path) -> Any:
    return steps(folder, "full")


def alike(folder: Path) -> Any:
    """The probe and the passes of shared beginnings are meetings too."""
    sections = {"data": {"train": [str(folder / "alike.jsonl")]}, "train": {"epochs": 1}}
    return whole_alike(folder, recipe_of(folder, "full", **sections))


def plain(folder: Path) -> Any:
    """Without the nodes that read weights by themselves."""
    return steps(folder, "full", kernels="plain")


def unhooked_planted(folder: Path) -> Any:
    """A layer that computes with its pieces."""
    right = fsdp.shard_layers

    def shard(found: Any, model: Any, body: Any, layers: Any, **how: Any) -> None:
        right(found, model, body, layers, **how)
        layers[-1]._forward_pre_hooks.clear()

    with patch.object(fsdp, "shard_layers", shard):
        return steps(folder, "full")


def recomputed(folder: Path) -> Any:
    return steps(folder, "full", train={"checkpointed_layers": 1, "max_steps": 4})


def few_rows(folder: Path) -> Any:
    """A step of one row: a rank has none."""
    return steps(folder, "full", train={"epochs": 1, "rows_per_step": 1, "max_steps": 3})


def rounded(folder: Path) -> Any:
    """In bfloat16: float32 masters of the pieces."""
    recipe = recipe_of(folder, "full", train={"max_steps": 4}).model_copy(update={"precision": "bfloat16"})
    with together_as(recipe, folder) as made:
        found = steps_of(made)
        return {**found, "types": sorted({str(tensor.dtype) for tensor in made.attachment.trained.values()})}


def counted_planted(folder: Path) -> Any:
    """A pass that only keeps others company counts."""
    right = step._pass

    def run(state: Any, batch: Any, targets: float, *given: Any) -> Any:
        return right(state, batch, 30.0 if math.isinf(targets) else targets, *given)

    with patch.object(step, "_pass", run):
        return steps(folder, "full")


def averaged_planted(folder: Path) -> Any:
    """FSDP's own way: the mean over ranks."""
    with (
        patch.object(FSDPModule, "set_gradient_divide_factor", lambda layer, factor: None),
        patch.object(FSDPModule, "set_force_sum_reduction_for_comms", lambda layer, value: None),
    ):
        return steps(folder, "full")


def own_norm_planted(folder: Path) -> Any:
    """Each rank clips by the norm of its own pieces."""

    def own(state: Any) -> float:
        return float(step.gradient_norm(state.attachment.trained.values()))

    with patch("tunesmith.training.loop.step_norm", own):
        return steps(folder, "full", optim={"clip": 0.1})


def memory_ends(folder: Path) -> Any:
    """On rank 1, inside a pass: the others cannot go on."""
    right, gradients, at = step._pass, step.compute_gradients, {"step": 0}

    def compute(state: Any, sampler: Any, number: int) -> Any:
        at["step"] = number
        return gradients(state, sampler, number)

    def run(state: Any, *given: Any) -> Any:
        if state.world.rank == 1 and at["step"] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(state, *given)

    with (
        patch.object(step, "_pass", run),
        patch("tunesmith.training.loop.compute_gradients", compute),
        patch.object(world, "COLLECTIVE_S", 1.5),  # this process does not end
    ):
        return steps(folder, "lora")


def rehearsed(folder: Path) -> Any:
    """On rank 1, in the heaviest pass, before there was a step."""
    right = step._pass

    def run(state: Any, batch: Any, divisor: float, *given: Any) -> Any:
        if state.world.rank == 1 and divisor == math.inf:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(state, batch, divisor, *given)

    with patch.object(step, "_pass", run), patch.object(world, "COLLECTIVE_S", 1.5):
        return _train(folder, "run-rehearsed", "lora", train={"max_steps": 1})


def _train(folder: Path, name: str, method: str, **sections: Any) -> str:
    recipe = run_recipe(folder, method, **sections).model_copy(update={"shard": True})
    return str(train(recipe, root=folder / "root", out=folder / name).path)


def run_lora(folder: Path) -> Any:
    return _train(folder, "run-lora", "lora", train={"max_steps": 1})


def run_full(folder: Path) -> Any:
    return _train(folder, "run-full", "full")


def resumed_by_two(folder: Path) -> Any:
    """What one process began goes on with its layers split."""
    return str(resume(Run(folder / "from-one"), settings=["shard=true"]).path)


def killed_planted(folder: Path) -> Any:
    """A checkpoint is written where it will lie."""

    def in_place(among: Path, name: str) -> Path:
        (among / name).mkdir(parents=True, exist_ok=True)
        return among / name

    def moved(source: Path, target: Path, **how: Any) -> None: ...

    with patch.multiple(checkpoint, temporary_folder=in_place, replace_folder=moved, remove=lambda path: None):
        return killed(folder, "killed-planted")


def killed(folder: Path, name: str = "killed") -> Any:
    """Rank 1 is killed while it gives its pieces to the checkpoint of a step. The last scenario of its process."""
    right, steps_saved = checkpoint._whole, []

    def whole(tensor: Any) -> Any:
        if os.environ["RANK"] == "1" and hasattr(tensor, "full_tensor") and steps_saved:
            steps_saved.append(1)
            if len(steps_saved) > 5:
                os.kill(os.getpid(), signal.SIGKILL)
        return right(tensor)

    def save(session: Any) -> None:
        if session.progress.step >= KILLED_AT:
            steps_saved.append(1)
        right_save(session)

    right_save = trainer.save
    with patch.object(checkpoint, "_whole", whole), patch.object(trainer, "save", save):
        return _train(folder, name, "full")
