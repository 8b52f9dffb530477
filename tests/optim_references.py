"""Each optimizer written out in float64 from its paper, one tensor at a time: slow, and easy to compare with it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Memory = dict[str, Any]
"""What is kept of one tensor from step to step; empty before the first."""
Step = Callable[..., Tensor]
"""(weights, gradient, memory, *, step from 1, rate, decay) → weights; all float64."""


def adamw(w: Tensor, g: Tensor, kept: Memory, *, step: int, lr: float, decay: float) -> Tensor:
    """Loshchilov & Hutter, arXiv 1711.05101, algorithm 2."""
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * g
    kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * g**2
    mean, square = kept["m"] / (1 - 0.9**step), kept["v"] / (1 - 0.999**step)
    return w * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)


def lion(w: Tensor, g: Tensor, kept: Memory, *, step: int, lr: float, decay: float) -> Tensor:
    """Chen et al., arXiv 2302.06675, algorithm 2."""
    before = kept.get("m", torch.zeros_like(g))
    kept["m"] = 0.99 * before + 0.01 * g
    return w * (1 - lr * decay) - lr * (0.9 * before + 0.1 * g).sign()


def adafactor(w: Tensor, g: Tensor, kept: Memory, *, step: int, lr: float, decay: float) -> Tensor:
    """Shazeer & Stern, arXiv 1804.04235, algorithms 4 and 5, with a given rate and torch's place for epsilon."""
    share = 1 - step**-0.8
    if g.ndim > 1:
        kept["rows"] = share * kept.get("rows", 0) + (1 - share) * (g**2).mean(1, keepdim=True)
        kept["columns"] = share * kept.get("columns", 0) + (1 - share) * (g**2).mean(0, keepdim=True)
        square = kept["rows"] * kept["columns"] / kept["rows"].mean()
    else:
        square = kept["v"] = share * kept.get("v", 0) + (1 - share) * g**2
    update = g / square.sqrt()
    update = update / max(1.0, float(update.square().mean().sqrt()))
    size = max(1.0, float(w.square().mean().sqrt()))
    return w * (1 - lr * decay) - lr * size * update


def muon(w: Tensor, g: Tensor, kept: Memory, *, step: int, lr: float, decay: float) -> Tensor:
    """Jordan et al. 2024 (Newton–Schulz, Nesterov); their size as in Liu et al., arXiv 2502.16982, eq. 4."""
    kept["m"] = 0.95 * kept.get("m", 0) + 0.05 * g
    x = 0.05 * g + 0.95 * kept["m"]
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if g.shape[0] > g.shape[1] else x
    return w * (1 - lr * decay) - lr * 0.2 * max(g.shape) ** 0.5 * x


REFERENCES: dict[str, tuple[Step, float]] = {
    "adamw": (adamw, 1e-5),
    "adamw_8bit": (adamw, 0.05),  # two states of about seven and eight bits, of values over a wide range
    "lion": (lion, 1e-5),
    "adafactor": (adafactor, 1e-5),
    "muon": (muon, 0.02),  # torch's iteration computes in bfloat16
}
"""The reference of each optimizer, and how far five updates may be apart: norm of the difference ÷ norm of the way."""
