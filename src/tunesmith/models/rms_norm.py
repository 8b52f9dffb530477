"""An RMS norm in one node of the graph, in place of the six small operations that models spell it out in.

    y = x / rms(x) · w,  rms(x)² = mean(x²) + eps
    dx = (h - x · (h · x) / (H rms(x)²)) / rms(x),  h = dy ∘ w;  dw = Σ_T dy ∘ x / rms(x)

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the backward follows by the product
rule. Kept for it: x, which the model holds anyway, and one number a token. It computes in float32 inside. On a
card it is torch's own kernel of `F.rms_norm`, which reads x once.
"""

# T tokens, H hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models.card_kernels import on_card

COUNTED_FROM = (0, 1)
"""Numbers that models count the weights of a norm from. 0, as Llama: x is rounded, then multiplied by w. 1, as
Gemma: multiplied by 1 + w in float32, then rounded."""


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, *, start: int = 0) -> Tensor:
    """[..., H] → [..., H]; `start` is one of `COUNTED_FROM`. `origin_of` the answer knows how it came about, on
    a processor."""
    if on_card(x):
        return _CardNorm.apply(x, weight_H, eps, start)  # type: ignore[no-any-return,no-untyped-call]
    weight_H = weight_H.float() + start if start else weight_H
    out, inverse_T1 = _RmsNorm.apply(x, weight_H, eps)  # type: ignore[no-untyped-call]
    if out.requires_grad:
        out.origin = out._version, (x.detach(), weight_H.detach(), inverse_T1)
    return out  # type: ignore[no-any-return]


def origin_of(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The tensors from which `normed` computes a norm's output again, bit for bit. None: the tensor is no
    output of a norm, or was written into."""
    version, parts = getattr(tensor, "origin", (None, None))
    return parts if version is not None and version == tensor._version else None


def normed(x: Tensor, weight_H: Tensor, inverse_T1: Tensor) -> Tensor:
    """[..., H], the norm's answer."""
    return _finished(x.to(inverse_T1.dtype, copy=True), x, weight_H, inverse_T1)


def _finished(wide: Tensor, x: Tensor, weight_H: Tensor, inverse_T1: Tensor) -> Tensor:
    """The answer from x in float32, which is written into."""
    wide.mul_(inverse_T1)
    return wide.to(x.dtype).mul_(weight_H) if weight_H.dtype == x.dtype else wide.mul_(weight_H).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        # By its norm: torch's mean of squares takes twice as long.
        length_T1 = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse_T1 = length_T1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, inverse_T1)
        ctx.mark_non_differentiable(inverse_T1)
        return _finished(wide, x, weight_H, inverse_T1), inverse_T1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_H, inverse_T1 = ctx.saved_tensors
        wide = x.to(inverse_T1.dtype)
        gx = gweight_H = None
        if ctx.needs_input_grad[1]:
            gweight_H = (wide * inverse_T1).mul_(grad).flatten(0, -2).sum(0).to(weight_H.dtype)
        if ctx.needs_input_grad[0]:
            # A copy: in float32 it would be the incoming gradient itself.
            gnormed = grad.to(wide.dtype, copy=True).mul_(weight_H.to(wide.dtype))
            along_T1 = torch.linalg.vecdot(gnormed, wide).unsqueeze(-1).mul_(inverse_T1.pow(3)).div_(-x.shape[-1])
            gx = gnormed.mul_(inverse_T1).addcmul_(wide, along_T1).to(x.dtype)
        return gx, gweight_H, None


class _CardNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, start: int) -> Tensor:
        sizes = [len(weight_H)]
        # Weights that count from 1 come after: 1 + w would be rounded.
        out, inverse_T1 = torch.ops.aten._fused_rms_norm(x, sizes, None if start else weight_H, eps)
        ctx.save_for_backward(x, weight_H, inverse_T1)
        ctx.start = start
        return torch.addcmul(out, out, weight_H) if start else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight_H, inverse_T1 = ctx.saved_tensors
        needs = [bool(needed) for needed in ctx.needs_input_grad[:2]]
        backward = torch.ops.aten._fused_rms_norm_backward
        if not ctx.start:
            gx, gweight_H = backward(grad, x, [len(weight_H)], inverse_T1, weight_H, needs)
            return gx if needs[0] else None, gweight_H if needs[1] else None, None, None
        gx = gweight_H = None
        if needs[0]:
            gnormed = torch.addcmul(grad, grad, weight_H)
            gx, _ = backward(gnormed, x, [len(weight_H)], inverse_T1, None, [True, False])
        if needs[1]:
            gweight_H = (x * inverse_T1 * grad).flatten(0, -2).sum(0).to(weight_H.dtype)
        return gx, gweight_H, None, None
