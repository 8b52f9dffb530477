"""The layers of LoRA and DoRA, and their matrices before the first update.

    LoRA   y = x Wᵀ + b + s (x Aᵀ) Bᵀ
    DoRA   y = m / ‖V‖ ⊙ (x Vᵀ) + b,  V = W + s B A,  ‖V‖ the length of each row of V (of each output)

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1. Liu et al.,
"DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5; ‖V‖ is a constant to the gradient,
as in section 4.3, so it is computed once an update.
"""

# T tokens, I inputs, O outputs, R rank

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.methods.targets import PLAIN_FORWARDS, shape_OI
from tunesmith.models.heads import generator
from tunesmith.models.linear_nodes import LinearParts, Weight, linears
from tunesmith.models.quantized import QuantizedLinear


class LoraLinear(nn.Module):
    """A frozen linear layer (`nn.Linear`, GPT-2's transposed `Conv1D`, or quantised) with a low-rank path."""

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.active = True
        # A subclass may compute in its own way; then it is called instead of imitated.
        self._product_is_known = type(base).forward in PLAIN_FORWARDS
        num_outputs, num_inputs = shape_OI(base)
        weight = self.weight
        like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.zeros(rank, num_inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(num_outputs, rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O], by the equation of this file; `_fused` is the same, faster."""
        if not self.active:
            return self.base(x)  # type: ignore[no-any-return]
        if self._can_fuse:
            return self._fused(x)
        low: Tensor = F.linear(F.dropout(x, self.dropout, training=self.training), self.lora_A)
        return self.base(x) + F.linear(low, self.lora_B) * self.scale  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The base's, for models that read it, as T5 does for its dtype."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def is_transposed(self) -> bool:
        """Whether the base's weight is [I, O], as in GPT-2's Conv1D."""
        if isinstance(self.base, QuantizedLinear):
            return self.base.lies_transposed
        return isinstance(self.base, Conv1D)

    @property
    def weight_OI(self) -> Tensor:
        return self.weight.t() if self.is_transposed else self.weight

    @property
    def frozen(self) -> Weight:
        """The base's weight, or the function that unpacks it."""
        return self.base.weight_OI if isinstance(self.base, QuantizedLinear) else self.weight_OI

    @property
    def bias(self) -> Tensor | None:
        """The base's, which Mamba and Jamba read."""
        return self.base.bias  # type: ignore[return-value]

    def _fused(self, x: Tensor) -> Tensor:
        """`forward` as one node of autograd, which keeps x once and no product of the base."""
        return lora_forward(x, self.frozen, self.bias, self.lora_A, self.lora_B, scale=self.scale)

    @property
    def _can_fuse(self) -> bool:
        """False with dropout: the two paths then see different inputs, so autograd adds their gradients.
        Dropout draws from torch's own generator, which gradient checkpointing restores before it recomputes."""
        return self._product_is_known and not (self.dropout and self.training)

    def parts(self) -> LinearParts | None:
        """The tensors that the layer computes with now; None if it computes with others too."""
        if type(self).forward is not LoraLinear.forward or not (self.active and self._can_fuse):
            return None
        return LinearParts(self.frozen, self.bias, self.lora_A, self.lora_B, self.scale)

    def merged_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The weight of base and path together, float32."""
        return (b_OR.float() @ a_RI.float()).mul_(self.scale).add_(self.weight_OI)

    def refresh(self) -> None:
        """Recompute what follows from the matrices. Call after they changed."""


class DoraLinear(LoraLinear):
    """A frozen linear layer with a low-rank path and a length for each output."""

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout)
        # In float32: lengths differ from their start by less than bfloat16 resolves.
        self.lora_magnitude_vector = nn.Parameter(self._length_O())
        self.norm_O = self.lora_magnitude_vector.detach().clone()
        """‖V‖, float32, of the matrices that compute."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        out = super().forward(x)
        if not self.active:
            return out
        factor_O = self.lora_magnitude_vector / self.norm_O
        scaled = out * factor_O
        if self.bias is not None:
            # The bias was scaled too: added apart from the product, it would round unlike the plain layer.
            scaled = scaled + self.bias * (1.0 - factor_O)
        return scaled.to(out.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        self.norm_O = self._length_O()

    @torch.no_grad()
    def measure(self) -> None:
        """Start the trained lengths from the rows' present lengths, so that outputs are V's."""
        self.refresh()
        self.lora_magnitude_vector.copy_(self.norm_O)

    def _length_O(self) -> Tensor:
        with torch.no_grad():
            return _length_O(super().merged_OI(self.lora_A, self.lora_B))

    def merged_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """The weight of base, path and lengths together, float32."""
        v_OI = super().merged_OI(a_RI, b_OR)
        return v_OI.mul_((self.lora_magnitude_vector.detach() / _length_O(v_OI))[:, None])


def _length_O(v_OI: Tensor) -> Tensor:
    length_O: Tensor = torch.linalg.vector_norm(v_OI, dim=1)
    return length_O


def lora_forward(
    x: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float
) -> Tensor:
    """[..., I] → [..., O]."""
    return linears(x, [LinearParts(weight, bias_O, a_RI, b_OR, scale)])[0]


def initial_matrices(layer: nn.Module, *, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """float32 A [..., R, I], drawn from the seed and the layer's name, and B [..., O, R] of zeros."""
    a, b = layer.get_parameter("lora_A"), layer.get_parameter("lora_B")
    bound = 1 / math.sqrt(a.shape[-1])
    return torch.empty(a.shape).uniform_(-bound, bound, generator=generator(seed, name)), torch.zeros(b.shape)
