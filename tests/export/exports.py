"""Finished runs to export, made once, and the proof without the cost of a new process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.export import probe, verify
from tunesmith.recipe.knobs import Recipe
from tunesmith.run import Run
from tunesmith.training import train

LORA = {"name": "lora", "rank": 4, "alpha": 8}

SHORT: dict[str, Any] = {
    "train": {"max_steps": 3},
    "evaluation": {"samples": 1, "sample_tokens": 2, "surprising": 0},
    "checkpoint": {"every": 9},
}


@lru_cache
def finished(name: str) -> Run:
    """chat, full, or `<task>-<kind>` by LoRA."""
    folder = Path(mkdtemp(prefix="export-"))
    recipe: Recipe
    if name == "chat":
        recipe = tiny_recipe(folder, **SHORT)
    elif name == "full":
        recipe = task_recipe(folder, "chat", "causal", **SHORT)
    else:
        task, kind = name.split("-")
        recipe = task_recipe(folder, task, kind, method=LORA, optim={"lr": 1e-2}, **SHORT)
    return train(recipe, root=folder, out=folder / name, offline=True)


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof's other process is this one."""
    monkeypatch.setattr(verify, "launch", probe.do_job)


def card_head(folder: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md").data
