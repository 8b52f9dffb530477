"""Adapters of experts in files, as PEFT writes its `target_parameters` (`peft.tuners.lora.layer.ParamWrapper`).

A is [E R, I] there, the expert the slowest index, and B is [O, R E], the expert the *fastest*. PEFT wraps a
module of experts once for each tensor that is adapted, in the order in which the module holds them. So files
call the last one by the module's name, and the one before it `base_layer` of that.
"""

# E experts, I inputs, O outputs, R rank

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

_A, _B = ".lora_A.weight", ".lora_B.weight"


def file_names(products: Iterable[str]) -> dict[str, str]:
    """The name in files of each adapted product of experts. `products`: in the order of the model."""
    names: dict[str, str] = {}
    by_module: dict[str, list[str]] = {}
    for product in products:
        by_module.setdefault(product.rpartition(".")[0], []).append(product)
    for module, inside in by_module.items():
        for depth, product in enumerate(reversed(inside)):
            names[product] = module + ".base_layer" * depth
    return names


def to_file(tensors: Mapping[str, Tensor], products: Iterable[str]) -> dict[str, Tensor]:
    """Trained tensors by their names in files; matrices of experts as they lie there."""
    names = file_names(products)
    filed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if (product := name.removesuffix(_A)) in names:
            filed[names[product] + _A] = tensor.flatten(0, 1)
        elif (product := name.removesuffix(_B)) in names:
            filed[names[product] + _B] = tensor.permute(1, 2, 0).flatten(1)
        else:
            filed[name] = tensor
    return filed


def named_by_product(tensors: Mapping[str, Tensor], products: Iterable[str]) -> dict[str, Tensor]:
    """Tensors of a file as they lie there; matrices of experts by the names of their products."""
    renamed = {
        in_file + matrix: product + matrix for product, in_file in file_names(products).items() for matrix in (_A, _B)
    }
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


def shapes_in_file(product: str, shape_EOI: tuple[int, int, int], rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes in a file of the matrices of a product, by the product's name."""
    num_experts, num_outputs, num_inputs = shape_EOI
    return {product + _A: (num_experts * rank, num_inputs), product + _B: (num_outputs, rank * num_experts)}


def from_file(name: str, filed: Tensor, like: Tensor) -> Tensor:
    """A tensor of a file in the shape of the one that is trained, `like`: [E, R, I] or [E, O, R] of experts."""
    if filed.shape == like.shape:
        return filed
    if name.endswith(_A):
        return filed.view(like.shape)
    num_experts, num_outputs, rank = like.shape
    return filed.view(num_outputs, rank, num_experts).permute(2, 0, 1)
