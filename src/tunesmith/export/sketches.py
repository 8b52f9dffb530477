"""Weights by a few numbers each, so that two processes can compare models without either holding both.

A sketch of a weight W is u·W·v for eight pairs of random vectors that follow from its name. For two weights that differ
by D, each pair's numbers differ by a random number of variance ‖D‖², whatever D is: rows in another order as well as a
rounding. (Johnson and Lindenstrauss 1984; of rank one as in Woodruff 2014, "Sketching as a tool", section 2.)
"""

# O outputs, I inputs, K sketches

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tunesmith.models.heads import generator

NUM = 8
Sketches = dict[str, list[float]]
"""By the weight's name: its norm, then its sketches."""


@torch.no_grad()
def sketch_all(tensors: Iterable[tuple[str, Tensor]]) -> Sketches:
    """The sketches of weights, computed in float64 where it is small and float32 where it is not."""
    return {name: _sketch(name, tensor.detach().float().cpu()) for name, tensor in tensors}


def _sketch(name: str, tensor: Tensor) -> list[float]:
    w_OI = tensor.reshape(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    u_OK, v_IK = (
        torch.randn(size, NUM, generator=generator(NUM, f"{name}{axis}")) for axis, size in enumerate(w_OI.shape)
    )
    products_K = ((w_OI @ v_IK).double() * u_OK.double()).sum(0)
    return [float(w_OI.norm()), *products_K.tolist()]


def furthest(expected: Mapping[str, list[float]], found: Mapping[str, list[float]]) -> tuple[str, float]:
    """The weight that differs most, and by about how much of its size; infinity for one that is missing."""
    worst, name = 0.0, ""
    for key, (norm, *numbers) in expected.items():
        if key not in found:
            return key, float("inf")
        squares = [(a - b) ** 2 for a, b in zip(numbers, found[key][1:], strict=True)]
        distance = (sum(squares) / NUM) ** 0.5 / max(norm, 1e-12)
        if not distance <= worst:
            worst, name = distance, key
    return name, worst
