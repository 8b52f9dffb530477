"""The update: optimizers in a table, the rate of a step, clipping. Defined in docs/reference/schedules.md."""

from __future__ import annotations

from tunesmith.optim.optimizers import OPTIMIZERS, Optimizer, OptimizerRow, check_installed, clip_divisor, gradient_norm
from tunesmith.optim.schedules import SCHEDULES, rate, warmup_steps

__all__ = [
    "OPTIMIZERS", "SCHEDULES", "Optimizer", "OptimizerRow", "check_installed", "clip_divisor", "gradient_norm", "rate",
    "warmup_steps",
]  # fmt: skip
