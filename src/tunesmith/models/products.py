"""Products of many rows with a weight, in portions where oneDNN would leave one of two cores idle.

With AMX and two threads, a bfloat16 product of T rows and N outputs runs on one thread alone from about T = N on until
T is half as large again or twice as large: 826 µs where one thread takes 817, for 640 rows, 1,536 inputs and 576
outputs. Below, both threads work. So rows are cut into portions that lie below: 561 µs. Each row's sum is taken over
the same inputs, in float32, rounded once; in what order depends on the number of rows, as with any product.

Which products are cut follows from their shape, the number of threads and the processor alone, so that a run repeats.
More threads were not measured, and keep products whole. docs/EXPERIMENTS.md has the table.
"""

# T tokens, I inputs, O outputs

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.models.machine import cpu_flags

MOST, PORTION = 2.5, 0.78
"""Of the outputs: rows above which products are fast again, and rows of a portion."""
MARGIN = 32
"""Rows below the outputs from which a product is slow."""
FEWEST_INPUTS, FEWEST_OUTPUTS = 384, 192
"""A product with fewer is over before a second portion has begun."""


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ + b."""
    cuts = _cuts(x_TI, len(weight_OI))
    if cuts is None:
        return F.linear(x_TI, weight_OI, bias_O)
    out = x_TI.new_empty(len(x_TI), len(weight_OI))
    for x, y in zip(torch.split(x_TI, cuts), torch.split(out, cuts), strict=True):
        if bias_O is None:
            torch.mm(x, weight_OI.t(), out=y)
        else:
            torch.addmm(bias_O, x, weight_OI.t(), out=y)
    return out


def times(g_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """g W: the gradient before a linear layer, of that behind it."""
    cuts = _cuts(g_TO, weight_OI.shape[1])
    if cuts is None:
        return g_TO @ weight_OI
    out = g_TO.new_empty(len(g_TO), weight_OI.shape[1])
    for g, y in zip(torch.split(g_TO, cuts), torch.split(out, cuts), strict=True):
        torch.mm(g, weight_OI, out=y)
    return out


def add_times_(into_TI: Tensor, g_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """into + g W, in place."""
    cuts = _cuts(g_TO, weight_OI.shape[1])
    if cuts is None:
        return into_TI.addmm_(g_TO, weight_OI)
    for g, y in zip(torch.split(g_TO, cuts), torch.split(into_TI, cuts), strict=True):
        y.addmm_(g, weight_OI)
    return into_TI


def use_fast_linears(model: nn.Module) -> int:
    """Let every plain linear layer compute so, and its gradient, but those within a layer that is one node of the
    graph, and the output layer, which `output` computes; how many there are. None where no product is cut."""
    if not _is_two_with_amx():
        return 0
    taken = {part for module in model.modules() if "forward" in vars(module) for part in module.modules()}
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        taken.add(head)
    layers = [module for module in model.modules() if type(module) is nn.Linear and module not in taken]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    rows, sizes = x.numel() // layer.in_features, (layer.in_features, layer.out_features)
    is_cut = x.device.type == "cpu" and x.dtype == torch.bfloat16
    if not (is_cut and (_is_slow(rows, *sizes) or _is_slow(rows, *sizes[::-1]))):
        return F.linear(x, layer.weight, layer.bias)
    out: Tensor = _Linear.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return out


class _Linear(torch.autograd.Function):
    """F.linear, whose gradients autograd takes so too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return linear(x.reshape(-1, x.shape[-1]), weight_OI, bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        g_TO = grad.reshape(-1, grad.shape[-1])
        gx = times(g_TO, weight_OI).view_as(x) if needs_x else None
        g_weight = g_TO.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None
        return gx, g_weight, g_TO.sum(0) if needs_bias else None


def _cuts(x: Tensor, num_outputs: int) -> list[int] | None:
    """Rows of each portion; None: the product is fast as a whole."""
    rows, inputs = x.shape
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not _is_slow(rows, inputs, num_outputs):
        return None
    portion = max(64, int(PORTION * num_outputs) // 64 * 64)
    sizes = []
    while rows > num_outputs - MARGIN:
        sizes.append(portion)
        rows -= portion
    return [*sizes, rows]


def _is_slow(rows: int, inputs: int, outputs: int) -> bool:
    return (
        inputs >= FEWEST_INPUTS and outputs - MARGIN < rows < MOST * outputs and outputs >= 192 and _is_two_with_amx()
    )


def _is_two_with_amx() -> bool:
    return torch.get_num_threads() == 2 and _has_amx()


@cache
def _has_amx() -> bool:
    """Whether oneDNN multiplies bfloat16 with AMX here, which its variable ONEDNN_MAX_CPU_ISA may forbid."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return "amx_bf16" in cpu_flags() and ("AMX" in limit or limit in ("DEFAULT", "ALL"))
