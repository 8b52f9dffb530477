"""The forward of a LoRA layer by plain autograd, for comparison with the fused one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tunesmith.models.linear_nodes import Weight, dense


def lora_forward_reference(
    x: Tensor, weight: Weight, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float
) -> Tensor:
    """[..., I] → [..., O]: x Wᵀ + b + scale · (x Aᵀ) Bᵀ."""
    return F.linear(x, dense(weight), bias_O) + F.linear(F.linear(x, a_RI), b_OR) * scale
