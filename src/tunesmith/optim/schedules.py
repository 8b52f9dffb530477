"""The rate of every step. Defined in docs/reference/schedules.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Optim


def linear(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1 along a line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at 1 by half a cosine (Loshchilov & Hutter, arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}
"""The share of the peak rate after warm-up; progress runs from 0 at the first step to 1 after the last."""


def warmup_steps(total: int, optim: Optim) -> int:
    """Steps of warm-up: a share of all steps, rounded to the nearest, or the number given."""
    return math.floor((optim.warmup * total if optim.warmup < 1 else optim.warmup) + 0.5)


def rate(step: int, total: int, optim: Optim) -> float:
    """The learning rate of update `step`, counted from 1 to `total`.

    With W warm-up steps: peak · step / W up to step W, then peak · schedule((step - 1 - W) / (total - W)).
    """
    if not 1 <= step <= total:
        raise ValueError(f"step {step} of {total}: steps are counted from 1 to the last")
    warmup, peak = warmup_steps(total, optim), float(optim.lr)
    if step <= warmup:
        return peak * (step / warmup)
    return peak * SCHEDULES[optim.schedule]((step - 1 - warmup) / (total - warmup))
