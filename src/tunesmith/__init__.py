"""Tunesmith fine-tunes language models on your own data, on the machine you have, and proves that it worked.

    import tunesmith

    run = tunesmith.train("HuggingFaceTB/SmolLM2-135M-Instruct", "support.jsonl", method="lora")
    model, tokenizer = tunesmith.load(run)

Each name is imported when it is first used: `import tunesmith` alone costs nothing.
"""

import os
import sys

if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]  # Python puts it there for `python -m tunesmith`: a file typing.py in it would be run

import importlib
from typing import TYPE_CHECKING, Any

from tunesmith.environment.version import __version__ as __version__

if TYPE_CHECKING:
    from tunesmith.api import evaluate, load, predict, resume, train
    from tunesmith.errors import (
        DataError,
        InputError,
        ModelError,
        RecipeError,
        RunError,
        Stopped,
        TunesmithError,
        TunesmithWarning,
    )
    from tunesmith.recipe.schema import Recipe
    from tunesmith.runs.folder import Run
    from tunesmith.training.loop import training_steps
    from tunesmith.training.setup import prepare
    from tunesmith.training.trainer import Listener
    from tunesmith.types import Event

__all__ = [
    "DataError",
    "Event",
    "InputError",
    "Listener",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Run",
    "RunError",
    "Stopped",
    "TunesmithError",
    "TunesmithWarning",
    "evaluate",
    "load",
    "predict",
    "prepare",
    "resume",
    "train",
    "training_steps",
]

_HOMES = {
    "api": ("evaluate", "load", "predict", "resume", "train"),
    "errors": (
        "DataError",
        "InputError",
        "ModelError",
        "RecipeError",
        "RunError",
        "Stopped",
        "TunesmithError",
        "TunesmithWarning",
    ),
    "training.loop": ("training_steps",),
    "training.setup": ("prepare",),
    "recipe.schema": ("Recipe",),
    "runs.folder": ("Run",),
    "training.trainer": ("Listener",),
    "types": ("Event",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"tunesmith.{module}"), name)
    raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
