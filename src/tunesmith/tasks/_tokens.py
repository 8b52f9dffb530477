"""Prediction of tokens, shared by every task that generates or reads text: the next one, or the one under a mask."""

# N targets, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.models.forward import logits_at_targets
from tunesmith.recipe.knobs import Loss
from tunesmith.tasks._losses import PLAIN, target_losses
from tunesmith.types import Batch, Measured


def token_loss_sum(model: nn.Module, batch: Batch, loss: Loss = PLAIN) -> Tensor:
    """Sum of -log p(target) over the targets of a batch, and of what `loss` adds: a float32 scalar, in nats; 0 if there
    is none.

    A sum, not a mean: the loop divides once, by the targets of the whole step, so a row weighs the same whichever
    pass it lands in.
    """
    logits_NV = logits_at_targets(model, batch)
    return target_losses(logits_NV, batch.targets_N, loss).sum()


@torch.no_grad()
def token_measure(model: nn.Module, batch: Batch) -> Measured:
    """The same losses one by one, and each target's most likely token."""
    logits_NV = logits_at_targets(model, batch)
    return Measured(losses_N=target_losses(logits_NV, batch.targets_N), outputs_N=logits_NV.argmax(-1))
