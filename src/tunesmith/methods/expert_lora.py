"""LoRA on the experts of a mixture: for each product, two small matrices for each expert.

    y = x W_eᵀ + s (x A_eᵀ) B_eᵀ        for a token at expert e

Which layers these are, and how they compute, is in `models.experts`.
"""

# E experts, I inputs, O outputs, R rank

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.experts import ExpertMatrix, ExpertParts
from tunesmith.models.quantized_experts import QuantizedExperts

RANKS_READ_FAST = 8
"""Ranks are rounded up to a multiple of it, which torch's grouped products need in bfloat16."""


class ExpertLora(nn.Module):
    """A frozen product of all experts with a low-rank path for each of them."""

    def __init__(self, base: ExpertMatrix | QuantizedExperts, *, rank: int, scale: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.active = True
        num_experts, num_outputs, num_inputs = base.shape_EOI
        like: dict[str, Any] = {"dtype": base.dtype, "device": base.device}
        self.lora_A = nn.Parameter(torch.zeros(num_experts, rank, num_inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, num_outputs, rank, **like))

    def parts(self) -> ExpertParts:
        weight = self.base.parts().weight
        return ExpertParts(weight, self.lora_A, self.lora_B, self.scale) if self.active else ExpertParts(weight)

    @property
    def is_transposed(self) -> bool:
        """Whether the base's tensor is [E, I, O], as in GPT-OSS."""
        return self.base.is_transposed

    @property
    def weight(self) -> Tensor:
        """The base's, in its own orientation."""
        return self.base.weight

    def merged_OI(self, a_ERI: Tensor, b_EOR: Tensor) -> Tensor:
        """[E, O, I]: base and path of each expert together, float32."""
        merged_EOI = torch.bmm(b_EOR.float(), a_ERI.float()).mul_(self.scale)
        return merged_EOI.add_(self.weight.mT if self.is_transposed else self.weight)

    def refresh(self) -> None:
        """Do nothing: no other tensor is computed from the matrices."""


def usual_rank(rank: int, per_token: int) -> int:
    """The rank for an expert where a dense layer has `rank`: divided among the experts of a token,
    so that a token meets about as many numbers as it would there (Schulman & Thinking Machines
    Lab, "LoRA Without Regret", 2025)."""
    return min(rank, -(-max(1, rank // per_token) // RANKS_READ_FAST) * RANKS_READ_FAST)
