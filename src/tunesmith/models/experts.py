"""Experts of a mixture: the tokens that chose one go through its matrices together.

    y_s = x_s W_eᵀ + σ (x_s A_eᵀ) B_eᵀ        row s: a token at one of the experts that it chose, e

Since transformers 5 a mixture keeps a product of all its experts in one tensor, [E, O, I] or [E, I, O], and a
module says by its flags what lies between its two products. So one forward serves every family on transformers'
`ExpertsInterface`: it does what `grouped_mm_experts_forward` there does, in the same order, and equals it to
the last bit where no path is added. Here a product may also be packed, or have a low-rank path. W + σ B A is
never formed: that would be as many numbers as the experts have, in every pass.
"""

# T tokens, K experts a token, S = T K rows, E experts, I inputs, O outputs, R rank

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedConfig

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts")
"""Facts of a module of experts that transformers' `use_experts_implementation` and
the classes under it keep."""
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Names in configs for the number of experts that a token goes to."""
_ALIGNED_BYTES = 16
"""torch's grouped product reads matrices whose rows begin at multiples of 16 bytes."""


class ExpertMatrix(nn.Module):
    """One product of all experts: the tensor that a module of experts holds under a
    name, as a layer of its own."""

    def __init__(self, weight: nn.Parameter, *, is_transposed: bool) -> None:
        """`weight`: [E, O, I], or [E, I, O] if `is_transposed`. It is shared, not copied."""
        super().__init__()
        self.weight = weight
        self.is_transposed = is_transposed

    @property
    def weight_EOI(self) -> Tensor:
        return self.weight.mT if self.is_transposed else self.weight

    @property
    def shape_EOI(self) -> tuple[int, int, int]:
        num_experts, num_outputs, num_inputs = self.weight_EOI.shape
        return num_experts, num_outputs, num_inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def parts(self) -> ExpertParts:
        return ExpertParts(self.weight_EOI)


class PackedMatrices(Protocol):
    """Matrices that are unpacked one by one."""

    shape_EOI: tuple[int, int, int]

    def matrix_OI(self, expert: int) -> Tensor:
        """That of one expert."""
        ...


Matrices: TypeAlias = Tensor | PackedMatrices
"""[E, O, I]."""


@dataclass(frozen=True, slots=True)
class ExpertParts:
    """The parts that one product of the experts computes with."""

    weight: Matrices
    a_ERI: Tensor | None = None
    """None: there is no low-rank path."""
    b_EOR: Tensor | None = None
    scale: float = 1.0


class Rows:
    """The rows of a pass, sorted by the expert that each goes to."""

    def __init__(self, chosen_TK: Tensor, num_experts: int) -> None:
        self.experts_S, self.order_S = torch.sort(chosen_TK.reshape(-1), stable=True)
        self.tokens_S = self.order_S // chosen_TK.shape[-1]
        experts_E = torch.arange(num_experts, device=chosen_TK.device)
        self.ends_E = torch.searchsorted(self.experts_S, experts_E, right=True, out_int32=True)
        """Behind the last row of each expert."""

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row behind the last) of each expert that tokens chose."""
        ends = self.ends_E.tolist()
        spans = zip(range(len(ends)), [0, *ends], ends)  # noqa: B905 — the first list is one longer
        return [(expert, start, end) for expert, start, end in spans if start < end]

    def unsorted(self, y_SO: Tensor) -> Tensor:
        """The rows in the order of the tokens."""
        place_S = torch.empty_like(self.order_S)
        place_S[self.order_S] = torch.arange(len(place_S), device=place_S.device)
        return y_SO[place_S]


# Which modules are experts


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in tensors, and computes as this file does."""
    return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(module, "down_proj")


def product_names(experts: nn.Module) -> tuple[str, str]:
    """The names of the two products in a module of experts, in the order in which it computes."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of experts that `experts_forward` can compute, and its name."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every product of all experts by the name of its tensor, as a layer."""
    return {
        f"{name}.{product}": expert_layer(experts, product)
        for name, experts in expert_modules(model)
        for product in product_names(experts)
    }


def expert_layer(experts: nn.Module, product: str) -> nn.Module:
    """A product of all experts as a layer: what takes the place of its tensor, or
    the tensor as an `ExpertMatrix`."""
    inside: nn.Module | nn.Parameter = getattr(experts, product)
    if isinstance(inside, nn.Parameter):
        return ExpertMatrix(inside, is_transposed=bool(experts.is_transposed))
    return inside


def put_expert_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` compute the product of experts of this name; an `ExpertMatrix` is
    put back as the plain tensor."""
    parent, _, product = name.rpartition(".")
    experts = model.get_submodule(parent)
    delattr(experts, product)  # torch puts no module in the place of a parameter
    setattr(experts, product, layer.weight if isinstance(layer, ExpertMatrix) else layer)
    if any(isinstance(getattr(experts, each), nn.Module) for each in product_names(experts)):
        experts.forward = partial(experts_forward, experts)
    else:
        vars(experts).pop("forward", None)  # its own again


def experts_per_token(config: PreTrainedConfig) -> int:
    """The number of experts that a token goes to; 1 where the config does not say."""
    values = [getattr(config.get_text_config(), name, None) for name in _CHOSEN]
    first = next((value for value in values if value), 1)
    return int(max(first) if isinstance(first, (list, tuple)) else first)  # Hunyuan: one number a layer


# Computing


def experts_forward(experts: nn.Module, hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """[T, H]: the sum of what the chosen experts answer to each token, by their weights."""
    module: Any = experts
    up, down = (getattr(module, name) for name in product_names(experts))
    rows = Rows(chosen_TK, module.num_experts)
    up_bias, down_bias = (
        (getattr(module, f"{name}_bias") if module.has_bias else None) for name in product_names(experts)
    )
    y_SO = _product(hidden_TH[rows.tokens_S], up, rows, module.is_transposed, up_bias)
    inner_SI = module._apply_gate(y_SO) if module.has_gate else module.act_fn(y_SO)
    y_SH = _product(inner_SI, down, rows, module.is_transposed, down_bias)
    if module.has_post_expert_norm:
        y_SH = module.post_expert_norm(y_SH)
    weighted_SH = rows.unsorted(y_SH * weights_TK.reshape(-1)[rows.order_S, None])
    out_TH: Tensor = weighted_SH.view(*chosen_TK.shape, -1).sum(dim=1)
    return out_TH.to(hidden_TH.dtype)


def _product(x_SI: Tensor, layer: Any, rows: Rows, is_transposed: bool, bias_EO: Tensor | None) -> Tensor:
    parts = ExpertParts(layer.mT if is_transposed else layer) if isinstance(layer, nn.Parameter) else layer.parts()
    y_SO = expert_linear(x_SI, parts, rows)
    return y_SO if bias_EO is None else y_SO + bias_EO[rows.experts_S]


def expert_linear(x_SI: Tensor, parts: ExpertParts, rows: Rows) -> Tensor:
    """[S, I] → [S, O]. The weight is frozen; gradients reach x, A and B."""
    weight, packed = (parts.weight, None) if isinstance(parts.weight, Tensor) else (None, parts.weight)
    out: Tensor = _ExpertLinear.apply(  # type: ignore[no-untyped-call]
        x_SI, weight, parts.a_ERI, parts.b_EOR, packed, rows, parts.scale
    )
    return out


class _ExpertLinear(torch.autograd.Function):
    """Kept for the backward: x, and the product with A. No gradient of a weight, and none of W + σ B A."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd passes by place
        ctx: Any,
        x_SI: Tensor,
        weight_EOI: Tensor | None,
        a_ERI: Tensor | None,
        b_EOR: Tensor | None,
        packed: PackedMatrices | None,
        rows: Rows,
        scale: float,
    ) -> Tensor:
        y_SO = _by_expert(x_SI, _either(weight_EOI, packed), rows)
        low_SR = None
        if a_ERI is not None and b_EOR is not None:
            low_SR = _by_expert(x_SI, a_ERI, rows)
            y_SO.add_(_by_expert(low_SR, b_EOR, rows), alpha=scale)
        ctx.save_for_backward(x_SI, low_SR, weight_EOI, a_ERI, b_EOR)
        ctx.packed, ctx.rows, ctx.scale = packed, rows, scale
        return y_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_SO: Tensor) -> tuple[Tensor | None, ...]:
        x_SI, low_SR, weight_EOI, a_ERI, b_EOR = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        rows, g_SO = ctx.rows, g_SO.contiguous()
        gx_SI = ga_ERI = gb_EOR = None
        if needs_x:
            gx_SI = _by_expert(g_SO, _either(weight_EOI, ctx.packed), rows, back=True)
        if a_ERI is not None and b_EOR is not None:
            glow_SR = _by_expert(g_SO, b_EOR, rows, back=True).mul_(ctx.scale)
            if gx_SI is not None:
                gx_SI.add_(_by_expert(glow_SR, a_ERI, rows, back=True))
            ga_ERI = _sums_by_expert(glow_SR, x_SI, rows) if needs_a else None
            gb_EOR = _sums_by_expert(g_SO, low_SR, rows).mul_(ctx.scale) if needs_b else None
        return gx_SI, None, ga_ERI, gb_EOR, None, None, None


def _either(weight_EOI: Tensor | None, packed: PackedMatrices | None) -> Matrices:
    matrices = packed if weight_EOI is None else weight_EOI
    assert matrices is not None
    return matrices


def _by_expert(x_SI: Tensor, matrices: Matrices, rows: Rows, *, back: bool = False) -> Tensor:
    """[S, I] → [S, O]: each row times its expert's matrix, x Mᵀ; `back`: [S, O] → [S, I], x M."""
    if isinstance(matrices, Tensor):
        turned = matrices if back else matrices.mT
        if _can_group(x_SI, turned):
            return F.grouped_mm(x_SI, turned, offs=rows.ends_E)
        shape = matrices.shape
    else:
        shape = torch.Size(matrices.shape_EOI)
    y_SO = x_SI.new_zeros(len(x_SI), shape[2] if back else shape[1])
    for expert, start, end in rows.spans:
        matrix_OI = matrices[expert] if isinstance(matrices, Tensor) else matrices.matrix_OI(expert)
        torch.mm(x_SI[start:end], matrix_OI if back else matrix_OI.t(), out=y_SO[start:end])
    return y_SO


def _sums_by_expert(g_SO: Tensor, x_SI: Tensor, rows: Rows) -> Tensor:
    """[E, O, I]: the sum of gᵀ x over the rows of each expert; zeros for one that no token chose."""
    if _can_group(g_SO, x_SI):
        return F.grouped_mm(g_SO.t(), x_SI, offs=rows.ends_E)
    sums_EOI = g_SO.new_zeros(len(rows.ends_E), g_SO.shape[1], x_SI.shape[1])
    for expert, start, end in rows.spans:
        torch.mm(g_SO[start:end].t(), x_SI[start:end], out=sums_EOI[expert])
    return sums_EOI


def _can_group(*tensors: Tensor) -> bool:
    """Whether torch multiplies them by group, all experts in one operation: where it has such a product, for
    rows or columns that begin where it can read them."""
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return device.type in ("cpu", "cuda") and all(map(_is_aligned, tensors))


def _is_aligned(tensor: Tensor) -> bool:
    row, column = tensor.stride()[-2:]
    between = row if column == 1 else column
    return tensor.data_ptr() % _ALIGNED_BYTES == 0 and between * tensor.element_size() % _ALIGNED_BYTES == 0
