"""Prediction of tokens, shared by every task that generates or reads text: the next one, or the one under a mask."""

# N targets, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.models.forward import logits_at_targets
from tunesmith.types import Batch, Measured


def token_loss_sum(model: nn.Module, batch: Batch) -> Tensor:
    """Sum of -log p(target) over the targets of a batch: a float32 scalar, in nats; 0 if there is none.

    A sum, not a mean: the loop divides once, by the targets of the whole step, so a row weighs the same whichever
    pass it lands in.
    """
    logits_NV = logits_at_targets(model, batch)
    return F.cross_entropy(logits_NV.float(), batch.targets_N, reduction="sum")


@torch.no_grad()
def token_measure(model: nn.Module, batch: Batch) -> Measured:
    """The same losses one by one, and each target's most likely token."""
    logits_NV = logits_at_targets(model, batch).float()
    losses_N = F.cross_entropy(logits_NV, batch.targets_N, reduction="none")
    return Measured(losses_N=losses_N, outputs_N=logits_NV.argmax(-1))
