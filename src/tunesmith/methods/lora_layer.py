"""The layer of LoRA: a frozen linear layer with a product of two small matrices beside it.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

# T tokens, I inputs, O outputs, R rank, S ranks of the whole path

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from tunesmith.models.quantized import QuantizedLinear, product

Weight: TypeAlias = Tensor | Callable[[], Tensor]
"""A frozen weight [O, I], or what unpacks it: one that is kept packed is there in full for one product at a time."""


def dense(weight: Weight) -> Tensor:
    """The weight [O, I] for one product."""
    return weight if isinstance(weight, Tensor) else weight()


class LoraLinear(nn.Module):
    """A frozen linear layer (`nn.Linear`, GPT-2's `Conv1D`, whose weight lies transposed, or either quantised) with a
    low-rank path."""

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.active = True
        """False computes the base layer alone; see `without_adapter`."""
        # A subclass may compute in its own way; then it is asked instead of imitated.
        self._product_is_known = type(base).forward in (nn.Linear.forward, Conv1D.forward, QuantizedLinear.forward)
        num_outputs, num_inputs = shape_OI(base)
        weight = self.weight
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.start: tuple[Tensor, Tensor] | None = None
        """float32 A [R, I] and B [O, R] whose product is taken off again; see `methods.starts`."""
        self.lora_A = nn.Parameter(torch.zeros(rank, num_inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(num_outputs, rank, **like))

    @property
    def weight(self) -> Tensor:
        """That of the base, for models that look at it: T5 asks for its precision."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def lies_transposed(self) -> bool:
        """Whether the base's weight lies [I, O]."""
        return lies_transposed(self.base)

    @property
    def weight_OI(self) -> Tensor:
        return self.weight.t() if self.lies_transposed else self.weight

    @property
    def frozen(self) -> Weight:
        """What the base's part of the product is made with."""
        return self.base.weight_OI if isinstance(self.base, QuantizedLinear) else self.weight_OI

    @property
    def bias_O(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        if not self.active:
            out: Tensor = self.base(x)
            return out
        if (self.dropout and self.training) or not self._product_is_known:
            return self._forward_by_autograd(x)
        a_SI, b_OS = self.with_start(self.lora_A, self.lora_B)
        return lora_forward(x, self.frozen, self.bias_O, a_SI, b_OS, scale=self.scale)

    def _forward_by_autograd(self, x: Tensor) -> Tensor:
        # With dropout the two paths see different inputs, so autograd adds their gradients. Dropout draws from torch's
        # own generator, which gradient checkpointing restores before it recomputes.
        low: Tensor = F.linear(F.dropout(x, self.dropout, training=self.training), self.lora_A)
        out: Tensor = self.base(x) + F.linear(low, self.lora_B) * self.scale
        if self.start is not None:
            a_RI, b_OR = (matrix.to(x.dtype) for matrix in self.start)
            out = out - F.linear(F.linear(x, a_RI), b_OR) * self.scale
        return out

    def with_start(self, a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor]:
        """A [S, I] and B [O, S] of the whole path: the two given, or with a start twice as many ranks, of which the
        second half takes the start off.

        One product of both halves: what has not moved cancels inside it, before anything is rounded.
        """
        if self.start is None:
            return a_RI, b_OR
        start_a_RI, start_b_OR = (matrix.to(a_RI.dtype) for matrix in self.start)
        return torch.cat([a_RI, start_a_RI]), torch.cat([b_OR, -start_b_OR], dim=1)

    def delta_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """What the path adds to the weight, float32."""
        a_SI, b_OS = self.with_start(a_RI, b_OR)  # of the same precision: what has not moved must cancel
        return (b_OS.float() @ a_SI.float()).mul_(self.scale)

    def merged_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The weight that alone does what base and path do together, float32."""
        return self.delta_OI(a_RI, b_OR).add_(self.weight_OI)

    def refresh(self) -> None:
        """Compute anew what follows from the matrices. Call after they changed."""

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


def lies_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer's weight lies [I, O], as that of GPT-2's Conv1D."""
    return layer.lies_transposed if isinstance(layer, QuantizedLinear) else isinstance(layer, Conv1D)


def shape_OI(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    if isinstance(layer, QuantizedLinear):
        return layer.shape_OI
    rows, columns = layer.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def lora_forward(
    x: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float
) -> Tensor:
    """[..., I] → [..., O]; `weight` is frozen and gets no gradient."""
    out: Tensor = _LoraForward.apply(x, weight, bias_O, a_RI, b_OR, scale)  # type: ignore[no-untyped-call]
    return out


def lora_forward_reference(
    x: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float
) -> Tensor:
    """The same by plain autograd: slower, and what `lora_forward` is held equal to."""
    return F.linear(x, dense(weight), bias_O) + F.linear(F.linear(x, a_RI), b_OR) * scale


class _LoraForward(torch.autograd.Function):
    """One node for the whole layer: keeps x and x Aᵀ, adds the low-rank path in place, both ways."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any, x: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TR = x_TI @ a_RI.t()
        y_TO = product(x_TI, dense(weight), bias_O)
        y_TO.addmm_(low_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_TI, a_RI, b_OR, low_TR)
        ctx.weight = weight
        ctx.scale = scale
        ctx.shape = x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, Tensor | None, None]:
        x_TI, a_RI, b_OR, low_TR = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        g_TO = g.reshape(-1, g.shape[-1])
        gx = gbias_O = ga_RI = gb_OR = None
        if needs_x or needs_a:
            glow_TR = (g_TO @ b_OR).mul_(ctx.scale)
        if needs_x:
            gx = (g_TO @ dense(ctx.weight)).addmm_(glow_TR, a_RI).view(ctx.shape)
        if needs_a:
            ga_RI = glow_TR.t() @ x_TI
        if needs_b:
            # Transposed at the end: on CPU the product with R rows is a third faster than the one with R columns.
            gb_OR = (low_TR.t() @ g_TO).mul_(ctx.scale).t()
        if needs_bias:
            gbias_O = g_TO.sum(0)
        return gx, None, gbias_O, ga_RI, gb_OR, None
