"""Losses of heads that answer with classes or numbers: one answer a text, or one a word."""

# B rows, N targets, C classes

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.models.forward import sequence_logits, token_logits
from tunesmith.recipe.knobs import Loss
from tunesmith.tasks._losses import PLAIN, target_losses
from tunesmith.types import Batch, Labels, Measured


def sequence_loss_sum(model: nn.Module, batch: Batch, labels: Labels, loss: Loss = PLAIN) -> Tensor:
    """Sum of the rows' losses: cross-entropy, binary cross-entropy over all classes, or squared error; float32."""
    return _sequence_losses(sequence_logits(model, batch).float(), batch.targets_N, labels, loss).sum()


@torch.no_grad()
def sequence_measure(model: nn.Module, batch: Batch, labels: Labels) -> Measured:
    """Each row's loss and what the head answered."""
    logits_BC = sequence_logits(model, batch).float()
    return Measured(losses_N=_sequence_losses(logits_BC, batch.targets_N, labels), outputs_N=logits_BC)


def word_loss_sum(model: nn.Module, batch: Batch, labels: Labels, loss: Loss = PLAIN) -> Tensor:
    """Sum of the words' cross-entropies, each at the first piece of its word; float32."""
    return _class_losses(token_logits(model, batch), batch.targets_N, labels, loss).sum()


@torch.no_grad()
def word_measure(model: nn.Module, batch: Batch, labels: Labels) -> Measured:
    """Each word's loss and its most likely tag."""
    logits_NC = token_logits(model, batch).float()
    losses_N = _class_losses(logits_NC, batch.targets_N, labels)
    return Measured(losses_N=losses_N, outputs_N=logits_NC.argmax(-1))


def _sequence_losses(logits_BC: Tensor, targets_B: Tensor, labels: Labels, loss: Loss = PLAIN) -> Tensor:
    if labels.kind == "number":
        return (logits_BC[:, 0] - targets_B).square()
    if labels.kind == "many":
        return F.binary_cross_entropy_with_logits(logits_BC, targets_B, reduction="none").sum(-1)
    return _class_losses(logits_BC, targets_B, labels, loss)


def _class_losses(logits_NC: Tensor, targets_N: Tensor, labels: Labels, loss: Loss = PLAIN) -> Tensor:
    losses_N = target_losses(logits_NC, targets_N, loss)
    if labels.weights_C is None:
        return losses_N
    # Multiplied here and not inside cross_entropy, which divides by the weights of a pass instead of a step.
    weights_C = torch.from_numpy(labels.weights_C).to(losses_N)
    return losses_N * weights_C[targets_N]
