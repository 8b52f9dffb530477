"""Activation functions with their gradients, for autograd nodes that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation function, and the gradient before it from that behind it and its input."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(F.gelu, approximate=approximate),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate=approximate),
    )


ACTIVATIONS = (
    Activation(F.silu, torch.ops.aten.silu_backward),
    _gelu("tanh"),
    _gelu("none"),
    Activation(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
)
