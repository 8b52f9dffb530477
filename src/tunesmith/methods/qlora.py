"""QLoRA's base: the linear layers of a loaded model are packed, one by one, before LoRA goes on it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import RecipeError
from tunesmith.methods.targets import PLAIN_FORWARDS, Target, find_modules, inner_linears, replace_module, tied_reasons
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.quantized import PackOnLoad, QuantizedLinear, check_installed
from tunesmith.phrases import size
from tunesmith.recipe.methods import QloraMethod

ELEMENT_SIZE = 0.5625
"""Bytes of a packed weight with its scales, at most."""
BASE_FORMAT = "nf4 with scales in 8 bits"
"""Storage of the base's weights, in words."""


def packing(settings: QloraMethod) -> PackOnLoad:
    """The packing of linear layers as they are read; `quantize_base` packs what could not be.

    Raises RecipeError where bitsandbytes is not installed.
    """
    check_installed()
    # Whatever is read is on the device where it stays.
    return PackOnLoad(
        lambda model: [target.name for target in _choose(model, settings)[0] if len(target.names) == 1],
        lambda module: _pack(module, device=module.get_parameter("weight").device),
        element_size=ELEMENT_SIZE,
    )


@torch.no_grad()
def quantize_base(model: PreTrainedModel, settings: QloraMethod, *, device: str | torch.device) -> tuple[str, ...]:
    """Pack the linear layers inside the decoder and encoder layers, and move the model to `device`; notes.

    Modules that are trained whole, embeddings, norms and the head keep their weights. Each layer is packed on
    `device` and released before the next, so that neither side ever holds two models. Layers that `packing`
    packed stay.

    Raises:
        RecipeError: bitsandbytes is not installed, or the model has no linear layer that could be packed.
    """
    check_installed()
    targets, left_out = _choose(model, settings)
    targets.reverse()
    while targets:
        target = targets.pop()
        if not isinstance(target.module, QuantizedLinear):
            replace_module(model, target, _pack(target.module, device=device))
    model.to(device)
    free_cached_memory()  # otherwise the heap stays as large as the weights that were packed
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    before = size(sum(layer.weight_shape.numel() * layer.weight_dtype.itemsize for layer in packed))
    after = size(sum(layer.num_bytes for layer in packed))
    notes = [f"the base is quantised to {BASE_FORMAT}: {len(packed)} linear layers, {before} become {after}"]
    if left_out:
        notes.append(f"{left_out} linear layers are not quantised: they compute in their own way, or share a weight")
    return tuple(notes)


def _choose(model: PreTrainedModel, settings: QloraMethod) -> tuple[list[Target], int]:
    """The layers that are packed, or will be, and the number that cannot be. Raises RecipeError for none."""
    modules = find_modules(model, settings.also_train, ())
    trained_whole = {id(inner) for name in modules for inner in model.get_submodule(name).modules()}
    inside = [target for target in inner_linears(model) if id(target.module) not in trained_whole]
    targets = [
        target
        for target in inside
        if type(target.module).forward in PLAIN_FORWARDS and not tied_reasons(model, [target])
    ]
    if not targets:
        raise RecipeError("method.name: qlora: the model has no linear layer that can be quantised. Use method: lora.")
    return targets, len(inside) - len(targets)


@torch.no_grad()
def _pack(module: nn.Module, *, device: str | torch.device) -> QuantizedLinear:
    packed = QuantizedLinear(module, device=device)
    packed.train(module.training)
    return packed


def unpack_base(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every packed layer by an ordinary one with the weight that it unpacks to; returns the model."""
    for target in inner_linears(model):
        if isinstance(target.module, QuantizedLinear):
            replace_module(model, target, target.module.unpacked())
    return model
