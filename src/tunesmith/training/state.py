"""The state of training: everything the loop needs, and nothing else of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tunesmith.parallel.world import World

if TYPE_CHECKING:
    from torch import nn

    from tunesmith.data.collate import Collator
    from tunesmith.data.dataset import RowStore
    from tunesmith.data.sampler import MicroBatch, StepSampler
    from tunesmith.optim import Optimizer
    from tunesmith.recipe.schema import Recipe
    from tunesmith.types import Attachment, Batch, Task

FIRST_SCALE = 2.0**16
"""As torch.amp.GradScaler begins."""


@dataclass
class LossScale:
    """The factor of the loss in float16, whose smallest number is 6e-8: smaller gradients would become zero.

    A power of two, so that it changes no bit of a gradient that float16 can hold; gradients are divided by it before
    anything reads them. It is halved where they overflow, and the step is made anew; it never grows. Micikevicius et
    al. 2018, "Mixed Precision Training", arXiv 1710.03740, section 3.2.
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


@dataclass(frozen=True, slots=True)
class BatchKey:
    """A micro-batch of a step; its batch is a function of these."""

    step: int
    rows: MicroBatch
    copies: tuple[int, ...]

    def make(self, collator: Collator) -> Batch:
        return collator.batch(self.rows, draw=self.step, copies=self.copies, lines="learnt")


@dataclass
class Prefetcher:
    """Makes one batch ahead for a CUDA device. On a processor, which has no time to spare, each is made when needed."""

    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _ahead: tuple[BatchKey, Future[Batch]] | None = field(default=None, init=False)

    def batches(
        self, collator: Collator, keys: Sequence[BatchKey], then: Callable[[], BatchKey | None] = lambda: None
    ) -> Iterator[Batch]:
        """The batches of a step, in order. `then`: what is needed after them, found while the last one is at work."""
        if not works_ahead(collator):
            yield from (key.make(collator) for key in keys)
            return
        for key, following in zip(keys, [*keys[1:], None], strict=True):
            batch = self._take(collator, key)
            self._begin(collator, following)
            yield batch
        self._begin(collator, then())

    def _take(self, collator: Collator, key: BatchKey) -> Batch:
        """The batch that was made ahead; made now where another was, as after micro-batches were halved."""
        ahead, self._ahead = self._ahead, None
        return ahead[1].result() if ahead is not None and ahead[0] == key else key.make(collator)

    def _begin(self, collator: Collator, key: BatchKey | None) -> None:
        self._ahead = None if key is None else (key, self._thread.submit(key.make, collator))


def works_ahead(collator: Collator) -> bool:
    """Whether the device of its batches computes while this process goes on."""
    return torch.device(collator.device).type == "cuda"


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
    sampler: StepSampler
    """Says which rows make which step, and how they are cut into micro-batches."""
    total_steps: int
    device: str
    world: World = field(default_factory=World, kw_only=True)
    """This process among those that train the run together."""
    loss_scale: LossScale = field(default_factory=LossScale, kw_only=True)
    ahead: Prefetcher = field(default_factory=Prefetcher, kw_only=True)
    """Makes the next batch while a CUDA device is at work."""
