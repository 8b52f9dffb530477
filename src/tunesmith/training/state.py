"""The state of training: everything the loop needs, and nothing else of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.parallel.world import World

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.data.collate import Collator
    from tunesmith.data.dataset import RowStore
    from tunesmith.data.sampler import StepSampler
    from tunesmith.optim import Optimizer
    from tunesmith.recipe.schema import Recipe
    from tunesmith.tasks.task import BoundTask
    from tunesmith.types import Attachment, JsonObject

FIRST_SCALE = 2.0**16
"""As torch.amp.GradScaler begins."""


@dataclass
class LossScale:
    """The factor of the loss in float16, whose smallest number is 6e-8: smaller gradients would become zero.

    A power of two, so that it changes no bit of a gradient that float16 can hold; gradients are divided by it
    before anything reads them. It is halved where they overflow, and the step is made anew; it never grows.
    Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740, section 3.2.
    """

    value: float = 1.0
    """1: nothing is scaled."""

    @classmethod
    def of(cls, precision: str) -> LossScale:
        return cls(FIRST_SCALE if precision == "float16" else 1.0)

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


@dataclass
class TrainState:
    """A model and its rows, ready for the next step. It knows no folder, no evaluation, no plan of memory."""

    recipe: Recipe
    """Resolved: no "auto" is left. The loop reads its seed and its optimizer's options."""
    model: nn.Module
    task: BoundTask
    """Gives the loss of a batch."""
    attachment: Attachment
    """The trained tensors, and the way they reach the model."""
    optimizer: Optimizer
    """The optimizer and its state."""
    store: RowStore
    """The encoded training rows."""
    collator: Collator
    """Makes a batch from rows of `store`."""
    sampler: StepSampler
    """Says which rows make which step, and how they are cut into micro-batches."""
    total_steps: int
    device: str
    world: World = field(default_factory=World, kw_only=True)
    """This process among those that train the run together."""
    loss_scale: LossScale = field(default_factory=LossScale, kw_only=True)
    draw: Callable[[TrainState, int], Drawn] | None = field(default=None, kw_only=True)
    """Draws what a step learns, where `store` has prompts only: (state, step) → the
    state with that step's rows."""


@dataclass(frozen=True)
class Drawn:
    """A step's own rows."""

    state: TrainState
    """Its store, collator and sampler have the rows of this step alone."""
    rows: list[int] | None = None
    """The rows of the whole store from which they come; None: they are those rows."""
    values: Callable[[], JsonObject] = dict
    """Called after the passes: what was found, for the event of the step."""
    timing: Mapping[str, float] = field(default_factory=dict)
    earlier_s: float = 0.0
    """Seconds that its rows took before the step began."""
