"""Linear layers that read the same input, and gated MLPs, each in one node of the graph.

    siblings    low = x [A₁; A₂; ...]ᵀ,  yᵢ = x Wᵢᵀ + bᵢ + sᵢ lowᵢ Bᵢᵀ
    gated MLP   g, u as siblings,  h = act(g) ∘ u,  y = h Wᵀ + b + s (h Aᵀ) Bᵀ

The low-rank path may be missing, and each matrix may be trained or frozen. The input is read once for all A,
and its gradients are added where they are computed. Kept for the backward, numbers a token: siblings their
input and all ranks; an MLP its input, all ranks, and two of its width, g and u, from which act(g) and h are
computed again. An input that our norm answered is computed again too, from what the norm keeps.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1; Shazeer
2020, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6. The backward follows by the chain rule.
"""

# T tokens, I inputs, O outputs, F width of the MLP, R rank, S ranks of all siblings

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models.card_kernels import Activation, gate, gate_backward, on_card
from tunesmith.models.quantized import product
from tunesmith.models.rms_norm import normed, origin_of

Weight: TypeAlias = Tensor | Callable[[], Tensor]
"""A weight [O, I], or what unpacks it: one that is kept packed is there in full for one product at a time."""


def dense(weight: Weight) -> Tensor:
    """The weight [O, I] for one product."""
    return weight if isinstance(weight, Tensor) else weight()


@dataclass(frozen=True, slots=True)
class LinearParts:
    """The parts that a linear layer computes with."""

    weight: Weight
    bias_O: Tensor | None
    a_RI: Tensor | None = None
    """None: it has no low-rank path."""
    b_OR: Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weight, bias, A and B; None for what is missing or packed."""
        return self.weight if isinstance(self.weight, Tensor) else None, self.bias_O, self.a_RI, self.b_OR

    @property
    def rank(self) -> int:
        return 0 if self.a_RI is None else len(self.a_RI)


def linears(x: Tensor, layers: Sequence[LinearParts]) -> tuple[Tensor, ...]:
    """[..., I] → [..., O] by each of the layers."""
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    outs: tuple[Tensor, ...] = _Linears.apply(x, tuple(layers), *tensors)  # type: ignore[no-untyped-call]
    return outs


def gated_mlp(x: Tensor, layers: tuple[LinearParts, LinearParts, LinearParts], activation: Activation) -> Tensor:
    """[..., I] → [..., O] by gate, up and down."""
    tensors = [tensor for layer in layers for tensor in layer.tensors]
    out: Tensor = _GatedMlp.apply(x, layers, activation, *tensors)  # type: ignore[no-untyped-call]
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[LinearParts, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TS, outs = _forward(x_TI, layers)
        ctx.save_for_backward(*(origin_of(x) or (x_TI, None, None)), low_TS, *tensors)
        ctx.layers, ctx.shape = _frozen(layers), x.shape
        # No views of them: Longformer and DeBERTa write into the answer.
        return tuple(out.contiguous().resize_(*x.shape[:-1], out.shape[-1]) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, inverse_T1, low_TS, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        x_TI = _input(x, weight_H, inverse_T1)
        grads_TO = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        gx_TI, gradients = _backward(grads_TO, x_TI, low_TS, _thawed(ctx.layers, tensors), needs, needs_x=needs_x)
        return None if gx_TI is None else gx_TI.view(ctx.shape), None, *gradients


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: tuple[LinearParts, ...], activation: Activation, *tensors: Tensor | None
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TS, (g_TF, u_TF) = _forward(x_TI, layers[:2])
        low_TR, (y_TO,) = _forward(gate(g_TF, u_TF, activation), layers[2:])
        ctx.save_for_backward(*(origin_of(x) or (x_TI, None, None)), low_TS, low_TR, g_TF, u_TF, *tensors)
        ctx.layers, ctx.activation, ctx.shape = _frozen(layers), activation, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_H, inverse_T1, low_TS, low_TR, g_TF, u_TF, *tensors = ctx.saved_tensors
        layers, (needs_x, _, _, *needs) = _thawed(ctx.layers, tensors), ctx.needs_input_grad
        g_TO = grad.reshape(-1, grad.shape[-1])
        gh_TF, glow_TR = _of_input([g_TO], layers[2:], needs_x=True)
        assert gh_TF is not None
        # Without a matrix of `down` to train its input is not needed.
        needs_h = needs[8] or needs[10]
        h_TF, gg_TF, gu_TF = gate_backward(gh_TF, g_TF, u_TF, ctx.activation, needs_h=needs_h)
        of_down = _of_layers([g_TO], gu_TF if h_TF is None else h_TF, low_TR, glow_TR, layers[2:], needs[8:])
        x_TI = _input(x, weight_H, inverse_T1)
        gx_TI, gradients = _backward([gg_TF, gu_TF], x_TI, low_TS, layers[:2], needs[:8], needs_x=needs_x)
        return None if gx_TI is None else gx_TI.view(ctx.shape), None, None, *gradients, *of_down


def _frozen(layers: Sequence[LinearParts]) -> tuple[tuple[Weight | None, float], ...]:
    """Parts of layers that a node keeps, besides tensors, which autograd keeps: packed weights, scales."""
    return tuple((None if isinstance(layer.weight, Tensor) else layer.weight, layer.scale) for layer in layers)


def _thawed(kept: Sequence[tuple[Weight | None, float]], tensors: Sequence[Tensor | None]) -> tuple[LinearParts, ...]:
    layers = []
    for index, (packed, scale) in enumerate(kept):
        weight, bias_O, a_RI, b_OR = tensors[4 * index : 4 * index + 4]
        used = weight if packed is None else packed
        assert used is not None
        layers.append(LinearParts(used, bias_O, a_RI, b_OR, scale))
    return tuple(layers)


def _stacked(layers: Sequence[LinearParts]) -> Tensor | None:
    """[S, I]: the A of all layers."""
    matrices = [layer.a_RI for layer in layers if layer.a_RI is not None]
    return torch.cat(matrices) if len(matrices) > 1 else matrices[0] if matrices else None


def _input(x: Tensor, weight_H: Tensor | None, inverse_T1: Tensor | None) -> Tensor:
    """[T, I], the input of a node: x, or what a norm answered to it."""
    if weight_H is None or inverse_T1 is None:
        return x
    return normed(x, weight_H, inverse_T1).reshape(-1, x.shape[-1])


def _forward(x_TI: Tensor, layers: Sequence[LinearParts]) -> tuple[Tensor | None, list[Tensor]]:
    """[T, S], and what each layer answers."""
    a_SI = _stacked(layers)
    low_TS = None if a_SI is None else x_TI @ a_SI.t()
    outs, at = [], 0
    for layer in layers:
        if low_TS is None or layer.b_OR is None:
            outs.append(product(x_TI, dense(layer.weight), layer.bias_O))
            continue
        here_TR = low_TS[:, at : at + layer.rank]
        at += layer.rank
        if layer.bias_O is None:
            # The thin product first: the other one adds to it as it is computed, before it is rounded.
            y_TO = _scaled(here_TR, layer.b_OR.t(), layer.scale)
            outs.append(y_TO.addmm_(x_TI, dense(layer.weight).t()))
        else:
            y_TO = product(x_TI, dense(layer.weight), layer.bias_O)
            outs.append(y_TO.addmm_(here_TR, layer.b_OR.t(), alpha=layer.scale))
    return low_TS, outs


def _backward(
    grads_TO: Sequence[Tensor],
    x_TI: Tensor,
    low_TS: Tensor | None,
    layers: Sequence[LinearParts],
    needs: Sequence[bool],
    *,
    needs_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of the input and of each tensor of the layers, four a layer, where they are needed."""
    gx_TI, glow_TS = _of_input(grads_TO, layers, needs_x=needs_x)
    return gx_TI, _of_layers(grads_TO, x_TI, low_TS, glow_TS, layers, needs)


def _of_input(
    grads_TO: Sequence[Tensor], layers: Sequence[LinearParts], *, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the input, where it is needed, and of the product with all A [T, S]."""
    gx_TI = glow_TS = None
    if (a_SI := _stacked(layers)) is not None:
        glow_TS = grads_TO[0].new_empty(len(grads_TO[0]), len(a_SI))
        split = torch.split(glow_TS, [layer.rank for layer in layers], 1)
        for g_TO, layer, glow_TR in zip(grads_TO, layers, split, strict=True):
            if layer.b_OR is not None:
                if on_card(g_TO):
                    _scaled(g_TO, layer.b_OR, layer.scale, out=glow_TR)
                else:  # which takes no slow way where it writes between others
                    torch.mul(g_TO @ layer.b_OR, layer.scale, out=glow_TR)
        gx_TI = glow_TS @ a_SI if needs_x else None
    for g_TO, layer in zip(grads_TO, layers, strict=True):
        if needs_x:
            weight_OI = dense(layer.weight)
            gx_TI = g_TO @ weight_OI if gx_TI is None else gx_TI.addmm_(g_TO, weight_OI)
    return gx_TI, glow_TS


def _of_layers(  # noqa: PLR0917 — what the layers read and wrote, in this order
    grads_TO: Sequence[Tensor],
    x_TI: Tensor,
    low_TS: Tensor | None,
    glow_TS: Tensor | None,
    layers: Sequence[LinearParts],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient of each tensor of the layers, four a layer, where it is needed."""
    ranks = [layer.rank for layer in layers]
    rows: Sequence[Tensor | None] = [None] * len(layers)
    if glow_TS is not None and any(needs[2::4]):
        rows = torch.split(glow_TS.t() @ x_TI, ranks)
    lows: Sequence[Tensor | None] = [None] * len(layers) if low_TS is None else torch.split(low_TS, ranks, 1)
    gradients: list[Tensor | None] = []
    for index, (g_TO, layer, ga_RI, low_TR) in enumerate(zip(grads_TO, layers, rows, lows, strict=True)):
        needs_weight, needs_bias, needs_a, needs_b = needs[4 * index : 4 * index + 4]
        gradients += [g_TO.t() @ x_TI if needs_weight else None, g_TO.sum(0) if needs_bias else None]
        gradients.append(ga_RI if needs_a else None)
        gb_OR = None
        if needs_b and low_TR is not None:
            if on_card(g_TO):
                gb_OR = _scaled(g_TO.t(), low_TR, layer.scale)
            else:  # The product with R rows is a third faster than the one with R columns.
                gb_OR = (low_TR.t() @ g_TO).mul_(layer.scale).t()
        gradients.append(gb_OR)
    return gradients


def _scaled(a_MK: Tensor, b_KN: Tensor, scale: float, *, out: Tensor | None = None) -> Tensor:
    """[M, N]: a product times a number, in one operation."""
    return torch.addmm(a_MK.new_empty(()), a_MK, b_KN, beta=0, alpha=scale, out=out)
