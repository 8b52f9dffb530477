"""Prediction of tokens, shared by every task that generates or reads text: the next one, or the one under a mask."""

# N targets, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor, nn

from tunesmith.models.forward import hidden_states, logits_at_targets
from tunesmith.models.output import Output
from tunesmith.recipe.knobs import Loss
from tunesmith.tasks._losses import PLAIN, target_losses
from tunesmith.types import Batch, Measured


def token_loss_sum(model: nn.Module, batch: Batch, loss: Loss = PLAIN, output: Output | None = None) -> Tensor:
    """Sum of -log p(target) over the targets of a batch, and of what `loss` adds: a float32 scalar, in nats; 0 if there
    is none.

    A sum, not a mean: the loop divides once, by the targets of the whole step, so a row weighs the same whichever
    pass it lands in. `output`: the model's output layer, where it is known to be of a shape that needs no logits of all
    targets at once.
    """
    if output is not None:
        hidden_ND = hidden_states(model, batch)[batch.predict_N]
        smoothing, z = loss.label_smoothing, loss.z_loss
        return output.loss_sum(hidden_ND, batch.targets_N, smoothing=smoothing, z=z).float()
    logits_NV = logits_at_targets(model, batch)
    return target_losses(logits_NV, batch.targets_N, loss).sum()


@torch.no_grad()
def token_measure(model: nn.Module, batch: Batch) -> Measured:
    """The same losses one by one, and each target's most likely token."""
    logits_NV = logits_at_targets(model, batch)
    return Measured(losses_N=target_losses(logits_NV, batch.targets_N), outputs_N=logits_NV.argmax(-1))
