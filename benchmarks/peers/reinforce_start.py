"""What both sides of `python -m benchmarks reinforce` begin with.

    python reinforce_start.py JOB.json RESULT.json

Saves the model as a folder that transformers reads, and the prompts of every step in order. A process of its own, whose
memory is nobody's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from given_rows import run

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe


def recipe_of(job: dict[str, Any], *, held_rows: int | None = None) -> Recipe:
    """What is trained. `held_rows`: most held-out prompts that the run itself measures; None: all."""
    from tunesmith.recipe.load import validate

    return validate({
        "model": job["model"], "task": "reinforce", "method": {"name": "lora", "rank": 16, "alpha": 32},
        "precision": job["precision"], "device": "cpu", "threads": job["threads"], "seed": job.get("seed", 0),
        "data": {"train": [job["prompts"]]},
        "optim": {"lr": job["lr"], "schedule": "constant", "warmup": 0},
        "train": {"rows_per_step": job["rows_per_step"], "max_steps": job["steps"], "epochs": 99},
        "reinforce": {"grader": job["grader"], "samples": job["samples"], "max_new_tokens": job["max_new_tokens"]},
        "evaluation": {"samples": 0, "general": False, "every": None, "max_rows": held_rows},
    })  # fmt: skip


def save_base(model: str, folder: Path) -> None:
    """The model in float32 and its tokenizer as transformers saves them."""
    import torch

    from tunesmith.models.load import load_model, load_tokenizer
    from tunesmith.models.resolve_model import resolve_model

    located = resolve_model(model, offline=True)
    load_model(located, dtype=torch.float32, device="cpu").save_pretrained(folder)
    load_tokenizer(located, None).save_pretrained(folder)


def start(job: dict[str, Any]) -> dict[str, Any]:
    """RESULT.json: {"base": folder of the model, "order": rows of the prompts of each step, "held_out_rows"}."""
    from tunesmith.training.setup import prepare

    folder = Path(job["folder"])
    if not (folder / "base").exists():
        save_base(job["model"], folder / "base")
    setup = prepare(recipe_of(job), root=folder / "start-runs", offline=True)
    assert setup.drawing is not None, "task reinforce"
    prompts = setup.drawing.prompts

    def row(store: Any, index: int) -> dict[str, Any]:
        example = prompts[store][index]
        messages = [{"role": part.role, "content": part.text} for part in example.parts]
        return {"messages": messages, "ids": store.row(index).ids.tolist(), "item": dict(example.kept)}

    order = [[row(setup.store, i) for i in setup.sampler.rows(step)] for step in range(1, job["steps"] + 1)]
    held = [row(setup.rows.held_store, i) for i in setup.rows.held_rows.tolist()[: job["held_out"]]]
    setup.drawing.close()
    return {"base": str(folder / "base"), "order": order, "held_out_rows": held}


if __name__ == "__main__":
    run(start)
