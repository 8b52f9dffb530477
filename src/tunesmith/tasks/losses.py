"""Losses: of tokens (the next one, or the one under a mask), of whole texts, and of single words.

Every function gives a sum, not a mean: `training/step.py` divides once, by the targets of the
whole step, so a row weighs the same whichever micro-batch it lands in. What is added up is left in
the batch, for the rows of high loss.
"""

# B rows, N targets, V vocabulary, C classes

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from tunesmith.errors import RecipeError
from tunesmith.recipe.schema import Loss
from tunesmith.tasks.task import PLAIN_LOSS, Losses, Terms
from tunesmith.types import Batch, Labels, Measured, required

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.models.fused_loss import OutputLayer


def target_losses(logits_NV: Tensor, targets_N: Tensor, loss: Loss = PLAIN_LOSS) -> Tensor:
    """[N] float32, each target's own: (1 − ε) · −log p(target) + ε · mean over V of −log p + z · (log Σ exp)².

    ε: label smoothing, Szegedy et al. 2015, arXiv 1512.00567, section 7. z: Chowdhery et al. 2022, arXiv
    2204.02311, section 5. Nothing is divided by the targets of a micro-batch.
    """
    import torch
    from torch.nn import functional as F

    logits_NV = logits_NV.float()
    smoothing = loss.label_smoothing
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=smoothing)
    if loss.z_loss:
        losses_N = losses_N + loss.z_loss * torch.logsumexp(logits_NV, -1).square()
    return losses_N


def token_loss_sum(
    model: nn.Module, batch: Batch, loss: Loss = PLAIN_LOSS, output: OutputLayer | None = None
) -> Tensor:
    """Sum of −log p(target) and of what `loss` adds, over the targets of a batch: a float32 scalar in nats.

    `output`: the model's output layer if its shape allows computing the loss without
    the logits of all targets at once.
    """
    from tunesmith.models.forward import hidden_at_targets, logits_at_targets

    if output is not None:
        hidden_ND = hidden_at_targets(model, batch)
        smoothing, z = loss.label_smoothing, loss.z_loss
        return output.loss_sum(hidden_ND, batch.targets_N, smoothing=smoothing, z=z, losses=batch.losses).float()
    return _sum(batch, target_losses(logits_at_targets(model, batch), batch.targets_N, loss))


def _sum(batch: Batch, losses_N: Tensor) -> Tensor:
    batch.losses.append(losses_N.detach())
    return losses_N.sum()


def token_measure(model: nn.Module, batch: Batch, output: OutputLayer | None = None) -> Measured:
    """Loss and most likely token of each target, without gradient.

    `output`: as for `token_loss_sum`; then the logits of all targets never exist at once.
    """
    import torch

    from tunesmith.models.forward import hidden_at_targets, logits_at_targets

    with torch.no_grad():
        if output is None or not output.belongs_to(model):
            logits_NV = logits_at_targets(model, batch)
            return Measured(losses_N=target_losses(logits_NV, batch.targets_N), outputs_N=logits_NV.argmax(-1))
        hidden_ND = hidden_at_targets(model, batch)
        size = output.chunk_size(trained=False)
        losses, outputs = [], []
        for hidden, targets in zip(torch.split(hidden_ND, size), torch.split(batch.targets_N, size), strict=True):
            logits = output.logits(hidden)
            losses.append(target_losses(logits, targets))
            outputs.append(logits.argmax(-1))
        return Measured(losses_N=torch.cat(losses), outputs_N=torch.cat(outputs))


def sequence_loss_sum(model: nn.Module, batch: Batch, labels: Labels, loss: Loss = PLAIN_LOSS) -> Tensor:
    """Sum of the rows' losses: cross-entropy, binary cross-entropy over all classes,
    or squared error; float32."""
    from tunesmith.models.forward import sequence_logits

    return _sum(batch, _sequence_losses(sequence_logits(model, batch).float(), batch.targets_N, labels, loss))


def sequence_measure(model: nn.Module, batch: Batch, labels: Labels) -> Measured:
    """Loss and head outputs of each row, without gradient."""
    import torch

    from tunesmith.models.forward import sequence_logits

    with torch.no_grad():
        logits_BC = sequence_logits(model, batch).float()
        return Measured(losses_N=_sequence_losses(logits_BC, batch.targets_N, labels), outputs_N=logits_BC)


def word_loss_sum(model: nn.Module, batch: Batch, labels: Labels, loss: Loss = PLAIN_LOSS) -> Tensor:
    """Sum of the words' cross-entropies, each at the first token of its word; float32."""
    from tunesmith.models.forward import logits_at_targets

    return _sum(batch, _class_losses(logits_at_targets(model, batch), batch.targets_N, labels, loss))


def word_measure(model: nn.Module, batch: Batch, labels: Labels) -> Measured:
    """Loss and most likely tag of each word, without gradient."""
    import torch

    from tunesmith.models.forward import logits_at_targets

    with torch.no_grad():
        logits_NC = logits_at_targets(model, batch).float()
        losses_N = _class_losses(logits_NC, batch.targets_N, labels)
        return Measured(losses_N=losses_N, outputs_N=logits_NC.argmax(-1))


def _sequence_losses(logits_BC: Tensor, targets_B: Tensor, labels: Labels, loss: Loss = PLAIN_LOSS) -> Tensor:
    from torch.nn import functional as F

    if labels.kind == "number":
        return (logits_BC[:, 0] - targets_B).square()
    if labels.kind == "many":
        return F.binary_cross_entropy_with_logits(logits_BC, targets_B, reduction="none").sum(-1)
    return _class_losses(logits_BC, targets_B, labels, loss)


def _class_losses(logits_NC: Tensor, targets_N: Tensor, labels: Labels, loss: Loss = PLAIN_LOSS) -> Tensor:
    import torch

    from tunesmith.models.machine import to_device

    losses_N = target_losses(logits_NC, targets_N, loss)
    if labels.weights_C is None:
        return losses_N
    # Multiplied here and not inside cross_entropy, which divides by the weights of a micro-batch instead of a step.
    weights_C = to_device(torch.from_numpy(labels.weights_C).to(losses_N.dtype), losses_N.device)
    return losses_N * weights_C[targets_N]


def token_losses(terms: Terms) -> Losses:
    """Losses of tokens: the next one, or the one under a mask."""
    return Losses(
        partial(token_loss_sum, loss=terms.loss, output=terms.output), partial(token_measure, output=terms.output)
    )


def sequence_losses(terms: Terms) -> Losses:
    """Losses of a whole text's labels. Raises RecipeError for additions that such labels have not."""
    labels = _checked(terms)
    return Losses(partial(sequence_loss_sum, labels=labels, loss=terms.loss), partial(sequence_measure, labels=labels))


def word_losses(terms: Terms) -> Losses:
    """Losses of the words' labels."""
    labels = _checked(terms)
    return Losses(partial(word_loss_sum, labels=labels, loss=terms.loss), partial(word_measure, labels=labels))


def _checked(terms: Terms) -> Labels:
    labels = required(terms.labels)
    for option in ("label_smoothing", "z_loss"):
        if labels.kind in ("many", "number") and getattr(terms.loss, option):
            what = "numbers" if labels.kind == "number" else "classes of which several can hold"
            raise RecipeError(f"loss.{option}: is for one class of several; these labels are {what}. Leave it out.")
    return labels
