"""Rank: a score for a document that may answer a query.

A target is a row: a query with its documents. Its loss is a mean over documents or pairs of them, or that of its list.
"""

# B rows, L lines (one a document), K documents of a row

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.recipe.objectives import Rank, Reward
from tunesmith.tasks.embed import EMBED
from tunesmith.tasks.reward import branch_loss_sum, branch_measure, reward_losses
from tunesmith.types import Task

if TYPE_CHECKING:
    from torch import Tensor


def ranking_losses(scores_L: Tensor, wanted_L: Tensor, row_of_L: Tensor, values_B: Tensor, options: Rank) -> Tensor:
    """[B] the loss of each row. Sources: docs/embeddings.md."""
    import torch
    from torch.nn import functional as F

    empty_B = torch.zeros_like(values_B)
    if options.loss == "pairwise":
        return reward_losses(scores_L, wanted_L, row_of_L, empty_B, Reward(center=0.0))
    counts_B = torch.bincount(row_of_L, minlength=len(empty_B))
    if options.loss == "pointwise":
        weight = scores_L.new_tensor(options.positive_weight)
        losses_L = F.binary_cross_entropy_with_logits(scores_L, wanted_L, pos_weight=weight, reduction="none")
        return empty_B.index_add(0, row_of_L, losses_L / counts_B[row_of_L])
    found = [torch.split(values_L, counts_B.tolist()) for values_L in (scores_L, wanted_L)]
    lists = [-(wanted_K.softmax(0) * scores_K.log_softmax(0)).sum() for scores_K, wanted_K in zip(*found, strict=True)]
    return torch.stack(lists)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    if answer is None:
        return {"query": text, "document": text}
    return {"query": text, "documents": [answer, text[::-1]], "labels": [1, 0]}


RANK = Task(
    name="rank",
    doc="A score for a document that may answer a query.",
    shapes=("ranked_documents",),
    heads={"encoder": "sequence", "causal": "sequence"},
    loss_sum=partial(branch_loss_sum, losses=ranking_losses),
    measure=partial(branch_measure, losses=ranking_losses),
    encoder="tunesmith.data.branch_encoders:RankingEncoder",
    record=_record,
    learns_classes=True,
    takes_pairs=True,
    input_role="query",
    answer_key="score",
    detected="rows are a query with documents and their labels",
    on_overlong=("cut", "the beginning of a document shows what it is about; cut ones are counted"),
    headline_metrics=("ndcg_10", "mrr_10", "recall_1", "spearman"),
    next_commands=(("serve",), ("show",)),
    outcome="lists",
    rates=EMBED.rates,
    section="ranking",
)
