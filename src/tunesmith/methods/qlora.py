"""QLoRA's base: the linear layers and the experts of a model are packed, one by one, before LoRA goes on it."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import RecipeError
from tunesmith.methods.targets import (
    PLAIN_FORWARDS,
    Target,
    expert_targets,
    find_modules,
    inner_linears,
    is_inside,
    replace_module,
    tied_reasons,
)
from tunesmith.models.experts import ExpertMatrix, expert_layer, is_experts
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.quantized import BLOCK, PackOnLoad, QuantizedLinear, check_installed
from tunesmith.models.quantized_experts import QuantizedExperts, fits
from tunesmith.phrases import size
from tunesmith.recipe.methods import QloraMethod

ELEMENT_SIZE = 0.5625
"""Bytes of a packed weight with its scales, at most."""
BASE_FORMAT = "nf4 with scales in 8 bits"
"""Storage of the base's weights, in words."""


PACKED = (QuantizedLinear, QuantizedExperts)


def packing(settings: QloraMethod) -> PackOnLoad:
    """The packing of weights as they are read; `quantize_base` packs what could not be.

    Raises RecipeError where bitsandbytes is not installed.
    """
    check_installed()
    return PackOnLoad(
        lambda model: [target.weight_name for target in _choose(model, settings)[0] if len(target.names) == 1],
        _pack_read,
        element_size=ELEMENT_SIZE,
    )


@torch.no_grad()
def _pack_read(model: PreTrainedModel, name: str) -> nn.Module:
    """Pack the weight of this name, which has been read, on the device where it is;
    the layer that it is now."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if is_experts(parent):
        target = Target((name,), expert_layer(parent, name.rpartition(".")[2]))
    else:
        target = Target((name.removesuffix(".weight"),), parent)
    packed = _pack(target.module, device=model.get_parameter(name).device)
    replace_module(model, target, packed)
    return packed


@torch.no_grad()
def quantize_base(model: PreTrainedModel, settings: QloraMethod, *, device: str | torch.device) -> tuple[str, ...]:
    """Pack the linear layers and the experts inside the decoder and encoder layers, and
    move the model to `device`; notes.

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
        if not isinstance(target.module, PACKED):
            replace_module(model, target, _pack(target.module, device=device))
    model.to(device)
    free_cached_memory()  # otherwise the heap stays as large as the weights that were packed
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    packed = [(layer.weight_shape.numel() * layer.weight_dtype.itemsize, layer.num_bytes) for layer in linears]
    packed += [(layer.weight_shape.numel() * layer.dtype.itemsize, layer.num_bytes) for layer in experts]
    before, after = (size(sum(column)) for column in zip(*packed, strict=True))
    what = f"{len(linears)} linear layers" + (f" and {len(experts)} tensors of experts" if experts else "")
    notes = [f"the base is quantised to {BASE_FORMAT}: {what}, {before} become {after}"]
    if left_out:
        notes.append(f"{left_out} linear layers are not quantised: they compute in their own way, or share a weight")
    if odd := sum(not _can_pack(target) for target in expert_targets(model)):
        notes.append(f"{odd} tensors of experts are not quantised: an expert's numbers are no multiple of {BLOCK}")
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
    left_out = len(inside) - len(targets)
    experts = [target for target in expert_targets(model) if not is_inside(target.name, modules)]
    return [*targets, *filter(_can_pack, experts)], left_out


def _can_pack(target: Target) -> bool:
    return not isinstance(target.module, ExpertMatrix) or fits(target.module)


@torch.no_grad()
def _pack(module: nn.Module, *, device: str | torch.device) -> QuantizedLinear | QuantizedExperts:
    packed: QuantizedLinear | QuantizedExperts
    if isinstance(module, ExpertMatrix):
        packed = QuantizedExperts(module, device=device)
    else:
        packed = QuantizedLinear(module, device=device)
    packed.train(module.training)
    return packed


def unpack_base(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every packed layer by an ordinary one with the weight that it unpacks to; returns the model."""
    for target in (*inner_linears(model), *expert_targets(model)):
        if isinstance(target.module, PACKED):
            replace_module(model, target, target.module.unpacked())
    return model
