"""The factor of the loss in float16, whose smallest number is 6e-8: smaller gradients would become zero.

    gradients of scale · loss are computed; the masters' are divided by the scale before anything reads them

The scale is a power of two, so that it changes no bit of a gradient that float16 can hold. Micikevicius et al. 2018,
"Mixed Precision Training", arXiv 1710.03740, section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST = 2.0**16
"""As torch.amp.GradScaler begins."""


@dataclass
class LossScale:
    """The scale of a run. It is halved where gradients overflow, and the step is made anew; it never grows."""

    value: float = 1.0
    """1: nothing is scaled."""

    @classmethod
    def of(cls, precision: str) -> LossScale:
        return cls(FIRST if precision == "float16" else 1.0)

    def scaled(self, loss_sum: Tensor, num_targets: float) -> Tensor:
        """The loss of a micro-batch, divided by the targets of its step."""
        return loss_sum / num_targets if self.value == 1 else loss_sum * (self.value / num_targets)

    @torch.no_grad()
    def undo(self, trained: Iterable[Tensor]) -> None:
        """Divide all gradients by the scale."""
        gradients = [tensor.grad for tensor in trained if tensor.grad is not None]
        if self.value != 1 and gradients:
            torch._foreach_mul_(gradients, 1 / self.value)

    def gives_way(self, norm: float) -> bool:
        """Whether gradients of this norm overflowed, but may not with a smaller scale; it is halved then."""
        if math.isfinite(norm) or self.value <= 1:
            return False
        self.value /= 2
        return True
