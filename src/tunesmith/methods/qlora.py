"""QLoRA's base: the linear layers of a loaded model are packed, one by one, before LoRA goes on it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.methods.targets import find_modules, inner_linears, replace_module, tied_reasons
from tunesmith.models.machine import free_cached_memory
from tunesmith.models.quantized import QuantizedLinear, check_installed
from tunesmith.recipe.methods import QloraMethod

_KNOWN = (nn.Linear.forward, Conv1D.forward)


@torch.no_grad()
def quantize_base(model: PreTrainedModel, settings: QloraMethod, *, device: str | torch.device) -> tuple[str, ...]:
    """Pack the linear layers inside the decoder and encoder layers, and move the model to `device`. Returns notes.

    Modules that are trained whole, embeddings, norms and the head keep their weights. Each layer is packed on `device`
    and released before the next, so that neither side ever holds two models.

    Raises:
        RecipeError: bitsandbytes is not installed, or the model has no linear layer that could be packed.
    """
    check_installed()
    modules = find_modules(model, settings.also_train, ())
    whole = {id(inner) for name in modules for inner in model.get_submodule(name).modules()}
    inside = [target for target in inner_linears(model) if id(target.module) not in whole]
    targets = [
        target for target in inside if type(target.module).forward in _KNOWN and not tied_reasons(model, [target])
    ]
    if not targets:
        raise RecipeError("method.name: qlora: the model has no linear layer that can be quantised. Use method: lora.")
    num, left_out = len(targets), len(inside) - len(targets)
    before = after = 0
    error = size = 0.0
    targets.reverse()
    while targets:
        target = targets.pop()
        weight: Tensor = target.module.weight.detach()  # type: ignore[operator]
        packed = QuantizedLinear(target.module, quant=settings.quant, double=bool(settings.double_quant), device=device)
        packed.train(target.module.training)
        replace_module(model, target, packed)
        before += weight.numel() * weight.element_size()
        after += packed.num_bytes
        there = weight.to(device).float()
        size += float(there.square().sum())
        error += float(there.sub_(packed.weight).square_().sum())
    model.to(device)
    free_cached_memory()  # otherwise the heap stays as large as the weights that were packed
    off_by = (error / max(size, 1e-30)) ** 0.5
    notes = [
        f"the base is quantised to {base_format(settings)}: {num} linear layers, {_mib(before)} become "
        f"{_mib(after)}; a weight is off by {off_by:.1%} of the size of weights (root mean square)"
    ]
    if left_out:
        notes.append(f"{left_out} linear layers are not quantised: they compute in their own way, or share a weight")
    return tuple(notes)


def base_format(settings: QloraMethod) -> str:
    """Storage of the base's weights, in words."""
    return f"{settings.quant}{' with scales in 8 bits' if settings.double_quant else ''}"


def unpack_base(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every packed layer by an ordinary one with the weight that it unpacks to; returns the model."""
    for target in inner_linears(model):
        if isinstance(target.module, QuantizedLinear):
            replace_module(model, target, target.module.unpacked())
    return model


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
