"""The update: optimizers in one table, the rate of every step, clipping. Defined in docs/schedules.md."""

from __future__ import annotations

from tunesmith.optim.schedules import SCHEDULES, rate, warmup_steps
from tunesmith.optim.table import OPTIMIZERS, Optimizer, check_installed
from tunesmith.optim.update import Update, decays, excess, gradient_norm, parameter_groups

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Optimizer",
    "Update",
    "check_installed",
    "decays",
    "excess",
    "gradient_norm",
    "parameter_groups",
    "rate",
    "warmup_steps",
]
