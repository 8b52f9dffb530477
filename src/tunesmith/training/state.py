"""The state of training: everything the loop needs, and nothing else of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tunesmith.parallel.world import World
from tunesmith.training.loss_scale import LossScale
from tunesmith.training.prefetch import Prefetcher

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.data.collate import Collator
    from tunesmith.data.dataset import RowStore
    from tunesmith.data.sampler import StepSampler
    from tunesmith.models.neftune import EmbeddingNoise
    from tunesmith.optim import Optimizer
    from tunesmith.recipe.schema import Recipe
    from tunesmith.types import Attachment, Task


@dataclass
class TrainState:
    """A model and its rows, ready for the next step. It knows no folder, no evaluation, no plan of memory."""

    recipe: Recipe
    """Resolved: no "auto" is left. The loop reads its seed and its optimizer's options."""
    model: nn.Module
    task: Task
    """Gives the loss of a batch."""
    attachment: Attachment
    """The trained tensors, and the way they reach the model."""
    optimizer: Optimizer
    """The optimizer and its state."""
    store: RowStore
    """The encoded training rows."""
    collator: Collator
    """Makes a batch from rows of `store`."""
    plan: StepSampler
    """Says which rows make which step, and how they are cut into micro-batches."""
    noise: EmbeddingNoise
    total_steps: int
    device: str
    world: World = field(default_factory=World, kw_only=True)
    """This process among those that train the run together."""
    loss_scale: LossScale = field(default_factory=LossScale, kw_only=True)
    ahead: Prefetcher = field(default_factory=Prefetcher, kw_only=True)
    """Makes the next batch while a CUDA device is at work."""
