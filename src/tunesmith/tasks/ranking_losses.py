"""Losses of rankings: of the documents of each query, from a score for each.

A target is a row: a query with its documents. Its loss is a mean over documents or pairs of them, or that of its list.
"""

# B rows, L lines (one a document), K documents of a row

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.recipe.objectives import Rank, Reward
from tunesmith.tasks.reward_losses import reward_losses
from tunesmith.types import Batch, Measured

if TYPE_CHECKING:
    from torch import Tensor, nn

USUAL = Rank()
_PLAIN = Reward(center=0.0)


def ranking_losses(scores_L: Tensor, wanted_L: Tensor, row_of_L: Tensor, num: int, options: Rank) -> Tensor:
    """[B] the loss of each of `num` rows. Sources: docs/embeddings.md."""
    import torch
    from torch.nn import functional as F

    if options.loss == "pairwise":
        return reward_losses(scores_L, wanted_L, row_of_L, scores_L.new_zeros(num), _PLAIN)[0]
    counts_B = torch.bincount(row_of_L, minlength=num)
    empty_B = scores_L.new_zeros(num)
    if options.loss == "pointwise":
        weight = scores_L.new_tensor(options.positive_weight)
        losses_L = F.binary_cross_entropy_with_logits(scores_L, wanted_L, pos_weight=weight, reduction="none")
        return empty_B.index_add(0, row_of_L, losses_L / counts_B[row_of_L])
    found = [torch.split(values_L, counts_B.tolist()) for values_L in (scores_L, wanted_L)]
    lists = [-(wanted_K.softmax(0) * scores_K.log_softmax(0)).sum() for scores_K, wanted_K in zip(*found, strict=True)]
    return torch.stack(lists)


def _found(model: nn.Module, batch: Batch, options: Rank) -> tuple[Tensor, Tensor]:
    """[L] scores, [B] losses; float32."""
    from tunesmith.models.forward import sequence_logits

    scores_L = sequence_logits(model, batch)[:, 0].float()
    wanted_L = batch.targets_N.float()
    return scores_L, ranking_losses(scores_L, wanted_L, batch.row_of_N, len(batch.row_indices), options)


def ranking_loss_sum(model: nn.Module, batch: Batch, *, options: Rank = USUAL) -> Tensor:
    """Sum of the rows' losses, float32."""
    return _found(model, batch, options)[1].sum()


def ranking_measure(model: nn.Module, batch: Batch, *, options: Rank = USUAL) -> Measured:
    """The loss of each row, its scores and what they should be, without gradient."""
    import torch

    with torch.no_grad():
        scores_L, losses_B = _found(model, batch, options)
    counts = torch.bincount(batch.row_of_N, minlength=len(losses_B)).tolist()
    parts = (torch.split(values_L, counts) for values_L in (scores_L, batch.targets_N.float()))
    results = tuple({"scores": s.tolist(), "wanted_scores": w.tolist()} for s, w in zip(*parts, strict=True))
    return Measured(losses_N=losses_B, outputs_N=losses_B.new_empty(0), results=results)
