"""An RMS norm in one node of the graph, in place of the half dozen small operations that models spell it out in.

    y = x / rms(x) · w,  rms(x)² = mean(x²) + eps
    dx = (h - x · (h · x) / (H rms(x)²)) / rms(x),  h = dy ∘ w;  dw = Σ_T dy ∘ x / rms(x)

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the backward follows by the product rule.
Kept for it: x, which the model holds anyway, and one number a token. It computes in float32 inside.
"""

# T tokens, H hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

COUNTED_FROM = (0, 1)
"""Numbers that models count the weights of a norm from. 0, as Llama: x is rounded, then multiplied by w. 1, as Gemma:
multiplied by 1 + w in float32, then rounded."""


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, *, start: int = 0) -> Tensor:
    """[..., H] → [..., H]; `start` is one of `COUNTED_FROM`."""
    out: Tensor = _RmsNorm.apply(x, weight_H.float() + start if start else weight_H, eps)  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        out = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        # By its norm: torch's mean of squares takes twice as long.
        length_T1 = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
        inverse_T1 = length_T1.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, inverse_T1)
        out.mul_(inverse_T1)
        if weight_H.dtype == x.dtype:
            return out.to(x.dtype).mul_(weight_H)
        return out.mul_(weight_H).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_H, inverse_T1 = ctx.saved_tensors
        wide = x.to(inverse_T1.dtype)
        gx = gweight_H = None
        if ctx.needs_input_grad[1]:
            gweight_H = (wide * inverse_T1).mul_(grad).flatten(0, -2).sum(0).to(weight_H.dtype)
        if ctx.needs_input_grad[0]:
            gnormed = (grad * weight_H).to(wide.dtype)
            along_T1 = torch.linalg.vecdot(gnormed, wide).unsqueeze(-1).mul_(inverse_T1.pow(3)).div_(-x.shape[-1])
            # Without writing into it: in float32 it may be the incoming gradient itself.
            gx = torch.addcmul(gnormed * inverse_T1, wide, along_T1).to(x.dtype)
        return gx, gweight_H, None
