"""Numbers for texts: for an answer to a prompt (reward), or for a document that may answer a query (rank).

A target is a row, whose loss is the mean over its pairs of a better and a worse text or over its documents,
or the loss of its list.
"""

# B rows, L lines (one an answer or document), P pairs of lines, K documents of a row

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.recipe.objectives import Rank, Reward
from tunesmith.tasks.embed import EMBED
from tunesmith.tasks.preference_losses import measured, values_of
from tunesmith.types import Batch, Measured, Rates, Task

if TYPE_CHECKING:
    from torch import Tensor, nn


def reward_losses(rewards_L: Tensor, scores_L: Tensor, row_of_L: Tensor, margin_B: Tensor, options: Reward) -> Tensor:
    """[B] −log σ(r_i − r_j − m) + c (r_i + r_j)², the mean over the pairs of a row.

    m is the row's own margin and that of the recipe times the difference of both scores. Bradley–Terry: Stiennon et al.
    2020, arXiv 2009.01325; m: Touvron et al. 2023, arXiv 2307.09288, section 3.2.2; c: Eisenstein et al. 2023, arXiv
    2312.09244, eq. 2. Equal scores make no pair.
    """
    import torch
    from torch.nn import functional as F

    better_LL = (row_of_L[:, None] == row_of_L) & (scores_L[:, None] > scores_L)
    better_P, worse_P = better_LL.nonzero(as_tuple=True)
    row_P = row_of_L[better_P]
    margin_P = margin_B[row_P] + options.margin * (scores_L[better_P] - scores_L[worse_P])
    losses_P = -F.logsigmoid(rewards_L[better_P] - rewards_L[worse_P] - margin_P)
    losses_P = losses_P + options.center * (rewards_L[better_P] + rewards_L[worse_P]).square()
    share_P = torch.bincount(row_P, minlength=len(margin_B))[row_P].to(losses_P).reciprocal()
    return torch.zeros_like(margin_B).index_add(0, row_P, losses_P * share_P)


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


def branch_losses(model: nn.Module, batch: Batch, losses: Callable[..., Tensor], options: Any) -> tuple[Tensor, Tensor]:
    """[L] the number that the model gives to each branch, and [B] `losses` of the rows by them; float32."""
    from tunesmith.models.forward import sequence_logits

    rewards_L = sequence_logits(model, batch)[:, 0].float()
    margin_B = values_of(batch)[:, 0].float()
    return rewards_L, losses(rewards_L, batch.targets_N.float(), batch.row_of_N, margin_B, options)


def branch_loss_sum(model: nn.Module, batch: Batch, *, losses: Callable[..., Tensor], options: Any) -> Tensor:
    """Sum of the rows' losses, float32."""
    return branch_losses(model, batch, losses, options)[1].sum()


def branch_measure(model: nn.Module, batch: Batch, *, losses: Callable[..., Tensor], options: Any) -> Measured:
    """The loss of each row, and the number, score and tokens of each of its branches, without gradient."""
    import torch

    with torch.no_grad():
        rewards_L, losses_B = branch_losses(model, batch, losses, options)
    counts = torch.bincount(batch.row_of_N, minlength=len(losses_B)).tolist()
    columns = {"rewards": rewards_L, "scores": batch.targets_N.float(), "lengths": torch.tensor(batch.lengths)}
    parts = {key: [part.tolist() for part in torch.split(found_L, counts)] for key, found_L in columns.items()}
    return measured(losses_B, parts)


def _answered(text: str, answer: str | None = None) -> dict[str, Any]:
    if answer is None:
        return {"prompt": text, "completion": text}
    return {"prompt": text, "chosen": answer, "rejected": f"{answer} {answer}"}


def _searched(text: str, answer: str | None = None) -> dict[str, Any]:
    if answer is None:
        return {"query": text, "document": text}
    return {"query": text, "documents": [answer, text[::-1]], "labels": [1, 0]}


REWARD = Task(
    name="reward",
    doc="A number for an answer, higher for the better one.",
    shapes=("scored_answers",),
    heads={"causal": "sequence", "encoder": "sequence"},
    loss_sum=partial(branch_loss_sum, losses=reward_losses),
    measure=partial(branch_measure, losses=reward_losses),
    encoder="tunesmith.data.branch_encoders:RewardEncoder",
    record=_answered,
    is_chat=True,
    learns_classes=True,
    answer_key="reward",
    detected="rows have several answers to a prompt, in order or with scores",
    on_overlong=("error", "of a cut answer the model would learn that it was cut"),
    headline_metrics=("preference_accuracy", "margin", "calibration_error"),
    next_commands=(("predict", "FILE"), ("serve",), ("show",)),
    outcome="rewards",
    rows_per_step=32,
    rates=Rates(adapter=(1e-4, 1e-4), full=(3e-5, 1e-5)),
    section="reward",
)
RANK = Task(
    name="rank",
    doc="A score for a document that may answer a query.",
    shapes=("ranked_documents",),
    heads={"encoder": "sequence", "causal": "sequence"},
    loss_sum=partial(branch_loss_sum, losses=ranking_losses),
    measure=partial(branch_measure, losses=ranking_losses),
    encoder="tunesmith.data.branch_encoders:RankingEncoder",
    record=_searched,
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
