"""States of a model and of transformers: evaluation mode, gradient checkpointing, silence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from tunesmith.errors import RecipeError


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode without gradients; every module's own mode is restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def silence_transformers() -> Iterator[None]:
    """No progress bars and no log lines of transformers; errors come as exceptions anyway."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def disable_dropout(model: nn.Module) -> None:
    """Set every rate of dropout to 0, as a module or as a number that a module keeps, so that two passes in
    training mode find the same. The model's config stays as it is."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def checkpoint_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Recompute the first `num_layers` layers, and no other, whenever the model is in training mode.

    The recomputation is non-reentrant: gradients reach adapters in a layer whose input needs none, and dropout
    draws the same numbers again. Raises RecipeError if the model has fewer layers.
    """
    layers = layers_of(model)
    if num_layers > len(layers):
        raise RecipeError(
            f"train.checkpointed_layers: {num_layers}: {type(model).__name__} has {len(layers)} layers that "
            f"can be recomputed. Use at most {len(layers)}."
        )
    for index, layer in enumerate(layers):
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = index < num_layers


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers that can be recomputed, in the order of the model."""
    return [module for module in text_part(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def text_part(model: nn.Module) -> nn.Module:
    """The part that text passes through: the language model within a model that sees or hears too."""
    is_more = getattr(getattr(model, "config", None), "text_config", None) is not None
    decoder: nn.Module | None = model.get_decoder() if is_more else None  # type: ignore[operator]
    return model if decoder is None else decoder


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Give a model that generates another config inside the block."""
    if not model.can_generate():
        yield
        return
    original, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = original
