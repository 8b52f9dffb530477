"""The loss of each target from its logits, with what the recipe adds to it in training."""

# N targets, V vocabulary or classes

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.recipe.knobs import Loss

PLAIN = Loss()


def target_losses(logits_NV: Tensor, targets_N: Tensor, loss: Loss = PLAIN) -> Tensor:
    """[N] float32, each target's own: (1 − ε) · −log p(target) + ε · mean over V of −log p + z · (log Σ exp)².

    ε: label smoothing, Szegedy et al. 2015, arXiv 1512.00567, section 7. z: Chowdhery et al. 2022, arXiv 2204.02311,
    section 5. Nothing is divided by the targets of a pass.
    """
    logits_NV = logits_NV.float()
    smoothing = loss.label_smoothing
    losses_N = F.cross_entropy(logits_NV, targets_N, reduction="none", label_smoothing=smoothing)
    if loss.z_loss:
        losses_N = losses_N + loss.z_loss * torch.logsumexp(logits_NV, -1).square()
    return losses_N
