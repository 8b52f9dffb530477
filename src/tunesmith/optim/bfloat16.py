"""Updates of weights that are kept in bfloat16 alone, rounded so that on average nothing is lost.

A float32 number between two neighbours of bfloat16 becomes the upper one with the probability of its distance from the
lower one: the expected weight is the float32 one, so that small updates arrive as rare large ones. (Gupta, Agrawal,
Gopalakrishnan & Narayanan 2015, "Deep Learning with Limited Numerical Precision", arXiv 1502.02551, section 3; for
weights without masters Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

_DROPPED = 16
"""Bits of float32 that bfloat16 has not."""


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 values as bfloat16, up or down at random; one that bfloat16 has stays as it is.

    The dropped bits plus as many random ones carry over into the kept ones just as often as they should.
    """
    bits = values.view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << _DROPPED, generator=generator)
    kept = noise.add_(bits).bitwise_and_(-(1 << _DROPPED))
    return torch.where(values.isfinite(), kept.view(torch.float32), values).to(torch.bfloat16)


class StochasticRounding:
    """float32 copies of bfloat16 weights for an optimizer, which take memory only during their update.

    Random numbers for a weight follow from (seed, step, name) alone.
    """

    def __init__(self, trained: Mapping[str, Tensor], *, seed: int) -> None:
        self._weights = {name: tensor for name, tensor in trained.items() if tensor.dtype == torch.bfloat16}
        self._seed = seed
        self.leaves = {name: self._empty(tensor) for name, tensor in self._weights.items()}

    @staticmethod
    def _empty(weight: Tensor) -> Tensor:
        leaf = torch.empty(weight.shape, dtype=torch.float32, device=weight.device).requires_grad_()
        leaf.untyped_storage().resize_(0)
        return leaf

    @contextmanager
    @torch.no_grad()
    def widened(self, name: str, step: int) -> Iterator[None]:
        """Give the copy the weight's value and gradient inside the block; then round it into the weight, and drop the
        gradient."""
        weight, leaf = self._weights[name], self.leaves[name]
        leaf.untyped_storage().resize_(4 * weight.numel())
        leaf.copy_(weight)
        leaf.grad, weight.grad = weight.grad, None
        yield
        leaf.grad = None
        weight.copy_(round_stochastically(leaf.detach(), self._generator(name, step, weight.device)))
        leaf.untyped_storage().resize_(0)

    def _generator(self, name: str, step: int, device: torch.device) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}:{step}:{name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
