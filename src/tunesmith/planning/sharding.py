"""Whether the layers of a run's model can be split over its devices, decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS
from tunesmith.models import load
from tunesmith.models.resolve_model import ModelRef
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS
from tunesmith.types import Choice, ModelKind

ELEMENTWISE = ("adamw", "lion", "schedule_free")
"""Optimizers that update each number by itself, so that a piece of a weight is updated as the whole is."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def why_whole(recipe: Recipe, located: ModelRef, kind: ModelKind) -> str:
    """Why every device has to hold the whole model, by the option that is in the way; empty: its layers can be split.

    `recipe`: with its task and method decided.
    """
    return next(_reasons(recipe, located, kind), "")


def refuse_shard(recipe: Recipe, located: ModelRef, kind: ModelKind) -> None:
    """Raise RecipeError where the recipe wants layers split that cannot be."""
    if recipe.shard is True and (reason := why_whole(recipe, located, kind)):
        raise RecipeError(f"shard: true: not with {reason}. Change that, or leave shard out.")


def split_choice(recipe: Recipe, *, needed: str, room: str) -> Choice:
    """The choice to split the layers, where a whole model does not fit."""
    reason = f"a whole model on each device would need {needed} of {room}: the layers' weights are split over"
    return Choice("shard", True, f"{reason} {resolved(recipe.devices)}")


def _reasons(recipe: Recipe, located: ModelRef, kind: ModelKind) -> Iterator[str]:
    method: Any = recipe.method
    if recipe.devices in ("auto", 1):
        yield "devices: 1, which leaves nothing to split over"
    if located.is_gguf:
        yield f"model: {recipe.model}: a .gguf file is read whole"
    if kind == "encoder_decoder":
        yield f"model: {recipe.model}: it has an encoder and a decoder"
    if METHODS[method.name].quantizes:
        yield f"method.name: {method.name}: packed weights cannot be split"
    if method.name not in ("lora", "full"):
        yield f"method.name: {method.name}: it reads whole weights; lora and full do not"
    if (task := TASKS[resolved(recipe.task)]).compares:
        yield f"task: {recipe.task}: one process computes what the model was before"
    if task.look is not None:
        yield f"task: {recipe.task}: the rows of a step are looked at in passes of their own"
    if recipe.precision == "float16":
        yield "precision: float16: a step that overflows is made again, which every device would have to know"
    if method.name == "lora" and method.init == "pissa":
        yield "method.init: pissa: it reads whole weights"
    if method.name == "lora" and method.also_train:
        yield "method.also_train: weights in the layers would be trained whole"
    if method.name == "lora" and method.bias != "none":
        yield f"method.bias: {method.bias}: weights in the layers would be trained whole"
    if method.name == "full":
        yield from _reasons_of_full(recipe, located)


def _reasons_of_full(recipe: Recipe, located: ModelRef) -> Iterator[str]:
    method: Any = recipe.method
    if method.rounding == "stochastic":
        yield "method.rounding: stochastic: the numbers drawn for a piece would be other ones"
    if recipe.optim.name not in ELEMENTWISE:
        yield f"optim.name: {recipe.optim.name}: it looks at whole matrices; {', '.join(ELEMENTWISE)} do not"
    config = load.load_config(located).get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS):
        yield "method.name: full: devices whose tokens choose other experts would wait for each other"
