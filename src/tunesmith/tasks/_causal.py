"""Next-token prediction, shared by every task that generates text."""

# N targets, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.models.forward import logits_at_targets
from tunesmith.types import Batch, Measured


def next_token_loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of -log p(target) over the targets of a batch: a float32 scalar, in nats; 0 if there is none.

    A sum, not a mean: the loop divides once, by the targets of the whole step, so a row weighs the same whichever
    pass it lands in.
    """
    logits_NV = logits_at_targets(model, batch)
    return F.cross_entropy(logits_NV.float(), batch.targets_N, reduction="sum")


@torch.no_grad()
def next_token_measure(model: nn.Module, batch: Batch) -> Measured:
    """The same sum, and how many targets were the model's first choice."""
    logits_NV = logits_at_targets(model, batch).float()
    loss = F.cross_entropy(logits_NV, batch.targets_N, reduction="sum")
    correct = (logits_NV.argmax(-1) == batch.targets_N).sum()
    return Measured(loss_sum=loss, correct=correct, count=batch.num_targets)


def num_targets(batch: Batch) -> int:
    """Tokens that are trained."""
    return batch.num_targets
