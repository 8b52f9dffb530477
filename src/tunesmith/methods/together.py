"""LoRA layers that are computed together: those that read the same input, and a whole gated MLP.

    siblings:   low = x [A₁; A₂; ...]ᵀ,   yᵢ = x Wᵢᵀ + bᵢ + sᵢ lowᵢ Bᵢᵀ
    gated MLP:  g, u as siblings,   h = act(g) ∘ u,   y = h Wᵀ + s (h Aᵀ) Bᵀ

One node of the graph each. The input is read once for all A, its gradients are added where they are computed, and the
MLP keeps g and u alone: act(g) and h follow from them in the backward. Kept for it, numbers a token: siblings their
input and all ranks; an MLP its input, all ranks, and two of its width, where layer by layer it would be four.

What is not known stays layer by layer: other kinds of layers, dropout, biases in an MLP, a base that is not a plain
matrix, adapters that are switched off. This is asked at every call, so layers may change. Hu et al. 2021, arXiv
2106.09685, section 4.1; Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6.
"""

# T tokens, I inputs, O outputs, F width of the MLP, R rank, S ranks of all siblings

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.models.activations import ACTIVATIONS, Activation

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input, in the order in which models call them."""
MLP = ("gate_proj", "up_proj", "down_proj")
PROBE_TOKENS = 4


def compute_together(model: nn.Module, *, agrees: Agrees | None = None) -> tuple[int, int]:
    """Let LoRA layers compute together where that is the same; how many gated MLPs, and how many groups of siblings.

    Weights and names stay. A class of MLP is taken where a known activation gives its own answer and gradients.
    `agrees`: asks a model of shapes, which has no answer, another way.
    """
    asked = agrees or _agrees
    known: dict[tuple[type, type], Activation | None] = {}
    mlps = groups = 0
    for parent in model.modules():
        layers = [getattr(parent, name, None) for name in MLP]
        if _whole(layers) is not None and "forward" not in vars(parent):
            key = (type(parent), type(getattr(parent, "act_fn", None)))
            if key not in known:
                known[key] = next((act for act in ACTIVATIONS if asked(parent, act)), None)
            if (activation := known[key]) is not None:
                parent.forward = partial(_gated, parent, activation, parent.forward)
                mlps += 1
                continue
        for names in SIBLINGS:
            layers = [getattr(parent, name, None) for name in names]
            if all(type(layer) is LoraLinear for layer in layers):
                Siblings([layer for layer in layers if isinstance(layer, LoraLinear)]).join()
                groups += 1
    return mlps, groups


def plain(layer: LoraLinear) -> bool:
    """Whether the layer is a plain matrix with one low-rank path, now."""
    return (
        type(layer) is LoraLinear
        and type(layer.base) is nn.Linear
        and layer.active
        and layer.start is None
        and not (layer.dropout and layer.training)
        and not layer.weight.requires_grad
        and layer.weight.dtype == layer.lora_A.dtype
    )


class Siblings:
    """Layers that are called one after the other with the same input: the first computes for all."""

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self.layers = list(layers)
        self.alone = [layer.forward for layer in layers]
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def join(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self.forward, index)  # type: ignore[method-assign]

    def forward(self, index: int, x: Tensor) -> Tensor:
        """[..., I] → [..., O] of one layer."""
        if index and self.input is x and index in self.waiting:
            out = self.waiting.pop(index)
            if not self.waiting:
                self.input = None
            return out
        # What waits for an input that does not come back, as in a recomputation that is broken off, is let go.
        self.input, self.waiting = None, {}
        if index or not all(map(plain, self.layers)):
            return self.alone[index](x)
        outs = siblings_forward(x, self.layers)
        self.input, self.waiting = x, dict(enumerate(outs[1:], 1))
        return outs[0]


def siblings_forward(x: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    """What each of the layers makes of x."""
    weights = [tensor for layer in layers for tensor in (layer.weight, layer.bias_O, layer.lora_B)]
    scales = tuple(layer.scale for layer in layers)
    a_SI = torch.cat([layer.lora_A for layer in layers])
    outs: tuple[Tensor, ...] = _Siblings.apply(x, a_SI, scales, *weights)  # type: ignore[no-untyped-call]
    return outs


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a_SI: Tensor, scales: tuple[float, ...], *weights: Tensor | None) -> Any:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TS = x_TI @ a_SI.t()
        outs, kept, at = [], [], 0
        for i, scale in enumerate(scales):
            weight_OI, bias_O, b_OR = weights[3 * i : 3 * i + 3]
            assert weight_OI is not None
            assert b_OR is not None
            y_TO = F.linear(x_TI, weight_OI, bias_O)
            y_TO.addmm_(low_TS[:, at : at + b_OR.shape[1]], b_OR.t(), alpha=scale)
            at += b_OR.shape[1]
            outs.append(y_TO.view(*x.shape[:-1], -1))
            kept += [weight_OI, b_OR]
        ctx.save_for_backward(x_TI, a_SI, low_TS, *kept)
        ctx.scales, ctx.shape = scales, x.shape
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x_TI, a_SI, low_TS, *kept = ctx.saved_tensors
        needs_x, needs_a, _, *needs = ctx.needs_input_grad
        glow_TS = torch.empty_like(low_TS)
        gx_TI: Tensor | None = None
        found: list[Tensor | None] = []
        at = 0
        for i, (scale, grad) in enumerate(zip(ctx.scales, grads, strict=True)):
            weight_OI, b_OR = kept[2 * i : 2 * i + 2]
            g_TO = grad.reshape(-1, grad.shape[-1])
            here = slice(at, at + b_OR.shape[1])
            at = here.stop
            torch.mul(g_TO @ b_OR, scale, out=glow_TS[:, here])
            _, needs_bias, needs_b = needs[3 * i : 3 * i + 3]
            found += [
                None,
                g_TO.sum(0) if needs_bias else None,
                _of_b(low_TS[:, here], g_TO, scale) if needs_b else None,
            ]
            if needs_x:
                gx_TI = g_TO @ weight_OI if gx_TI is None else gx_TI.addmm_(g_TO, weight_OI)
        gx = None if gx_TI is None else gx_TI.addmm_(glow_TS, a_SI).view(ctx.shape)
        return gx, glow_TS.t() @ x_TI if needs_a else None, None, *found


def _of_b(low_TR: Tensor, g_TO: Tensor, scale: float) -> Tensor:
    # Transposed at the end, as in `lora_layer`: on CPU the product with R rows is faster.
    return (low_TR.t() @ g_TO).mul_(scale).t()


Agrees = Callable[[nn.Module, Activation], bool]


def _whole(layers: Sequence[Any]) -> list[LoraLinear] | None:
    """The three layers of an MLP that can be one node now; None if they cannot."""
    known = [layer for layer in layers if isinstance(layer, LoraLinear) and plain(layer) and layer.bias_O is None]
    return known if len(known) == len(MLP) else None


def _gated(module: nn.Module, activation: Activation, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    layers = _whole([getattr(module, name, None) for name in MLP])
    if layers is None:
        return own(x)
    gate, up, down = layers
    out: Tensor = _Gated.apply(  # type: ignore[no-untyped-call]
        x,
        torch.cat([gate.lora_A, up.lora_A]),
        *(matrix for layer in layers for matrix in (layer.weight, layer.lora_B)),
        down.lora_A,
        tuple(layer.scale for layer in layers),
        activation,
    )
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any,
        x: Tensor,
        a_SI: Tensor,
        gate_FI: Tensor,
        gate_b_FR: Tensor,
        up_FI: Tensor,
        up_b_FR: Tensor,
        down_OF: Tensor,
        down_b_OR: Tensor,
        down_a_RF: Tensor,
        scales: tuple[float, float, float],
        activation: Activation,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TS = x_TI @ a_SI.t()
        rank = gate_b_FR.shape[1]
        g_TF = F.linear(x_TI, gate_FI).addmm_(low_TS[:, :rank], gate_b_FR.t(), alpha=scales[0])
        u_TF = F.linear(x_TI, up_FI).addmm_(low_TS[:, rank:], up_b_FR.t(), alpha=scales[1])
        h_TF = activation.value(g_TF).mul_(u_TF)
        low_TR = h_TF @ down_a_RF.t()
        y_TO = F.linear(h_TF, down_OF).addmm_(low_TR, down_b_OR.t(), alpha=scales[2])
        matrices = a_SI, gate_FI, gate_b_FR, up_FI, up_b_FR, down_OF, down_b_OR, down_a_RF
        ctx.save_for_backward(x_TI, low_TS, g_TF, u_TF, low_TR, *matrices)
        ctx.scales, ctx.activation, ctx.shape = scales, activation, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_TI, low_TS, g_TF, u_TF, low_TR, *matrices = ctx.saved_tensors
        a_SI, gate_FI, gate_b_FR, up_FI, up_b_FR, down_OF, down_b_OR, down_a_RF = matrices
        scales, rank = ctx.scales, gate_b_FR.shape[1]
        g_TO = grad.reshape(-1, grad.shape[-1])
        glow_TR = (g_TO @ down_b_OR).mul_(scales[2])
        gdown_b_OR = _of_b(low_TR, g_TO, scales[2])
        gh_TF = (g_TO @ down_OF).addmm_(glow_TR, down_a_RF)
        act_TF = ctx.activation.value(g_TF)
        gdown_a_RF = glow_TR.t() @ (act_TF * u_TF)
        gu_TF = act_TF.mul_(gh_TF)
        gg_TF = ctx.activation.backward(gh_TF.mul_(u_TF), g_TF)
        glow_TS = torch.empty_like(low_TS)
        torch.mul(gg_TF @ gate_b_FR, scales[0], out=glow_TS[:, :rank])
        torch.mul(gu_TF @ up_b_FR, scales[1], out=glow_TS[:, rank:])
        ggate_b_FR = _of_b(low_TS[:, :rank], gg_TF, scales[0])
        gup_b_FR = _of_b(low_TS[:, rank:], gu_TF, scales[1])
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (gg_TF @ gate_FI).addmm_(gu_TF, up_FI).addmm_(glow_TS, a_SI).view(ctx.shape)
        return gx, glow_TS.t() @ x_TI, None, ggate_b_FR, None, gup_b_FR, None, gdown_b_OR, gdown_a_RF, None, None


def _agrees(module: nn.Module, activation: Activation) -> bool:
    """Result and all gradients of a few random tokens."""
    layers = [getattr(module, name) for name in MLP]
    matrices = [matrix for layer in layers for matrix in (layer.lora_A, layer.lora_B)]
    like = layers[0].weight
    drawn = torch.randn(PROBE_TOKENS, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    ways = (partial(_gated, module, activation, module.forward), module.forward)
    try:
        ours, theirs = (_answer(way, drawn, matrices) for way in ways)
    except (RuntimeError, TypeError):  # another signature, or other shapes
        return False
    # Sums over a width of thousands, rounded in another order.
    tolerance = 16 * max(torch.finfo(like.dtype).eps, torch.finfo(torch.float32).eps)
    return all(float((a - b).norm()) <= tolerance * float(b.norm()) for a, b in zip(ours, theirs, strict=True))


@torch.enable_grad()
def _answer(mlp: Callable[[Tensor], Tensor], x: Tensor, matrices: Sequence[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = mlp(x)
    grads = torch.autograd.grad(out, [x, *matrices], torch.ones_like(out), materialize_grads=True)
    return [tensor.detach().float() for tensor in (out, *grads)]
