"""RMS norms in one node of the graph, in place of the half dozen small steps that models spell them out in.

    y = x / rms(x) · w,  rms(x)² = mean(x²) + eps
    dx = (h - x̂ · mean(h ∘ x̂)) / rms(x),  h = dy ∘ w,  x̂ = x / rms(x);  dw = Σ_T dy ∘ x̂

Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4; the backward follows by the product rule.
What is kept for it is x, which the model holds anyway, and one number a token; steps are float32 inside.

Models differ in where they round, and in whether w counts from 0 or from 1. Which of the known ways a module goes is
asked of the module itself: it is replaced only where one of them gives its answer and its gradient.
"""

# T tokens, H hidden size

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PROBE_TOKENS = 4


def use_fast_norms(model: nn.Module, *, with_numbers: Callable[[nn.Module], nn.Module] = lambda norm: norm) -> int:
    """Replace the forward of every RMS norm that is known and agrees; how many were. Weights and names stay.

    `with_numbers`: of a model of shapes, a twin of a norm that can be asked.
    """
    ways: dict[tuple[type, torch.dtype], Callable[..., Tensor] | None] = {}
    replaced = 0
    for module in model.modules():
        if not _looks_known(module):
            continue
        key = (type(module), _weight(module).dtype)
        if key not in ways:
            twin = with_numbers(module)
            ways[key] = next((way for way in (_rounded_first, _counted_from_one) if _agrees(twin, way)), None)
        if (way := ways[key]) is not None:
            module.forward = partial(way, module)
            replaced += 1
    return replaced


def _looks_known(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # T5 calls its own a layer norm, which it is but for the mean.
    is_named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    return is_named and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]


def _epsilon(module: nn.Module) -> float:
    return float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))


def _rounded_first(module: nn.Module, x: Tensor) -> Tensor:
    """As Llama and most others: x̂ is rounded to the precision of x, then multiplied by w."""
    out: Tensor = _RmsNorm.apply(x, _weight(module), _epsilon(module))  # type: ignore[no-untyped-call]
    return out


def _counted_from_one(module: nn.Module, x: Tensor) -> Tensor:
    """As Gemma: multiplied by 1 + w in float32, rounded last."""
    weight_H = _weight(module).float() + 1
    out: Tensor = _RmsNorm.apply(x, weight_H, _epsilon(module))  # type: ignore[no-untyped-call]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        wide_x = x.to(wide, copy=True)
        inverse_T1 = wide_x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_H, inverse_T1)
        out = wide_x.mul_(inverse_T1)
        if weight_H.dtype == x.dtype:
            return out.to(x.dtype).mul_(weight_H)
        return out.mul_(weight_H).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_H, inverse_T1 = ctx.saved_tensors
        wide = _wide(x)
        normed = x.to(wide, copy=True).mul_(inverse_T1)
        gx = gw_H = None
        if ctx.needs_input_grad[1]:
            gw_H = (grad * normed).flatten(0, -2).sum(0).to(weight_H.dtype)
        if ctx.needs_input_grad[0]:
            gnormed = (grad * weight_H).to(wide)
            mean_T1 = torch.linalg.vecdot(gnormed, normed).unsqueeze(-1).div_(x.shape[-1])
            # A product of float32 weights may be the incoming gradient itself: nothing is changed in place before this.
            gx = (gnormed - normed.mul_(mean_T1)).mul_(inverse_T1).to(x.dtype)
        return gx, gw_H, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _agrees(module: nn.Module, way: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Result and gradient of a few random tokens, one of them large: equal but for the last bit of rounding."""
    weight_H = _weight(module)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, PROBE_TOKENS, len(weight_H), generator=generator)
    drawn[0, 0] *= 100
    x, grad = (part.to(weight_H) for part in drawn)
    try:
        ours, theirs = (_answer(norm, x, grad) for norm in (partial(way, module), module.forward))
    except (RuntimeError, TypeError):  # another signature, or other shapes
        return False
    # Models compute in float32 inside, in float64 too.
    tolerance = 4 * max(torch.finfo(weight_H.dtype).eps, torch.finfo(torch.float32).eps)
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(ours, theirs, strict=True))


@torch.enable_grad()
def _answer(norm: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    (gx,) = torch.autograd.grad(out, x, grad)
    return out.detach(), gx
