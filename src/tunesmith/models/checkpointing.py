"""Layers whose activations are recomputed in the backward pass instead of kept."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import RecipeError


def checkpoint_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Recompute the first `num_layers` layers, and no other, whenever the model is in training mode.

    The recomputation is non-reentrant: gradients reach adapters in a layer whose input needs none, and dropout draws
    the same numbers again. Raises RecipeError if the model has fewer layers.
    """
    layers = _layers(model)
    if num_layers > len(layers):
        raise RecipeError(
            f"train.checkpointed_layers: {num_layers}: {type(model).__name__} has {len(layers)} layers that can be "
            f"recomputed. Use at most {len(layers)}."
        )
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = index < num_layers


def count_layers(model: nn.Module) -> int:
    """How many layers can be recomputed."""
    return len(_layers(model))


def _layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
