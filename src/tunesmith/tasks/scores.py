"""Numbers for texts: for an answer to a prompt (reward), or for a document that may answer a query (rank).

A target is a row, whose loss is the mean over its pairs of a better and a worse text or over its documents,
or the loss of its list.
"""

# B rows, L lines (one an answer or document)

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tunesmith.errors import DataError
from tunesmith.recipe.objectives import Rank, Reward
from tunesmith.tasks.embed import EMBED
from tunesmith.tasks.preference_losses import measured, values_of
from tunesmith.tasks.task import LabelHead, Losses, OwnSection, Rates, Task
from tunesmith.types import Batch, Choice, JsonObject, Measured

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.tasks.task import Side


class RowLosses(Protocol):
    """[B], the loss of each row by the number that the model gives to each of its branches."""

    def __call__(self, scores_L: Tensor, wanted_L: Tensor, row_of_L: Tensor, values_B: Tensor, /) -> Tensor: ...


def reward_losses(rewards_L: Tensor, scores_L: Tensor, row_of_L: Tensor, margin_B: Tensor, options: Reward) -> Tensor:
    """[B] −log σ(r_i − r_j − m) + c (r_i + r_j)², the mean over the pairs of a row.

    m is the row's own margin and the recipe's times the difference of both scores. Bradley–Terry: Stiennon et
    al. 2020, arXiv 2009.01325; m: Touvron et al. 2023, arXiv 2307.09288, section 3.2.2; c: Eisenstein et al.
    2023, arXiv 2312.09244, eq. 2. Equal scores make no pair.
    """
    import torch
    from torch.nn import functional as F

    # All pairs of lines, of which those that count are summed: to list these a card would have to be waited for.
    is_better_LL = (row_of_L[:, None] == row_of_L) & (scores_L[:, None] > scores_L)
    margin_LL = margin_B[row_of_L][:, None] + options.margin * (scores_L[:, None] - scores_L)
    losses_LL = -F.logsigmoid(rewards_L[:, None] - rewards_L - margin_LL)
    losses_LL = losses_LL + options.center * (rewards_L[:, None] + rewards_L).square()
    losses_L = torch.where(is_better_LL, losses_LL, 0.0).sum(1)
    pairs_B = torch.zeros_like(margin_B).index_add(0, row_of_L, is_better_LL.sum(1).to(margin_B))
    return torch.zeros_like(margin_B).index_add(0, row_of_L, losses_L) / pairs_B.clamp_min(1)


def ranking_losses(scores_L: Tensor, wanted_L: Tensor, row_of_L: Tensor, values_B: Tensor, options: Rank) -> Tensor:
    """[B] the loss of each row. Sources: docs/guide/embeddings.md."""
    import torch
    from torch.nn import functional as F

    from tunesmith.models.pooling import count_each

    empty_B = torch.zeros_like(values_B)
    if options.loss == "pairwise":
        return reward_losses(scores_L, wanted_L, row_of_L, empty_B, Reward(center=0.0))
    if options.loss == "pointwise":
        counts_B, weight = count_each(row_of_L, len(empty_B)), scores_L.new_full((), options.positive_weight)
        losses_L = F.binary_cross_entropy_with_logits(scores_L, wanted_L, pos_weight=weight, reduction="none")
        return empty_B.index_add(0, row_of_L, losses_L / counts_B[row_of_L])
    is_other_BL = torch.arange(len(empty_B), device=row_of_L.device)[:, None] != row_of_L
    scores_BL, wanted_BL = (
        values_L.expand_as(is_other_BL).masked_fill(is_other_BL, float("-inf")) for values_L in (scores_L, wanted_L)
    )
    return -(wanted_BL.softmax(1) * scores_BL.log_softmax(1).masked_fill(is_other_BL, 0)).sum(1)


def branch_losses(model: nn.Module, batch: Batch, losses: RowLosses) -> tuple[Tensor, Tensor]:
    """[L] the number that the model gives to each branch, and [B] `losses` of the rows by them; float32."""
    from tunesmith.models.forward import sequence_logits

    rewards_L = sequence_logits(model, batch)[:, 0].float()
    margin_B = values_of(batch)[:, 0].float()
    return rewards_L, losses(rewards_L, batch.targets_N.float(), batch.row_of_N, margin_B)


def branch_loss_sum(model: nn.Module, batch: Batch, *, losses: RowLosses) -> Tensor:
    """Sum of the rows' losses, float32."""
    return branch_losses(model, batch, losses)[1].sum()


def branch_measure(model: nn.Module, batch: Batch, *, losses: RowLosses) -> Measured:
    """The loss of each row, and the number, score and tokens of each of its branches, without gradient."""
    import torch

    with torch.no_grad():
        rewards_L, losses_B = branch_losses(model, batch, losses)
    counts = torch.bincount(batch.row_of_N, minlength=len(losses_B)).tolist()
    columns = {"rewards": rewards_L, "scores": batch.targets_N.float(), "lengths": torch.tensor(batch.lengths)}
    parts = {key: [part.tolist() for part in torch.split(found_L, counts)] for key, found_L in columns.items()}
    return measured(losses_B, parts)


def by_branch(losses: RowLosses) -> Losses:
    """Losses of rows whose branches each get a number."""
    return Losses(partial(branch_loss_sum, losses=losses), partial(branch_measure, losses=losses))


def _answered(text: str, answer: str | None = None) -> JsonObject:
    if answer is None:
        return {"prompt": text, "completion": text}
    return {"prompt": text, "chosen": answer, "rejected": f"{answer} {answer}"}


def _searched(text: str, answer: str | None = None) -> JsonObject:
    if answer is None:
        return {"query": text, "document": text}
    return {"query": text, "documents": [answer, text[::-1]], "labels": [1, 0]}


def _refuse_single_documents(options: Rank, sides: Sequence[Side]) -> list[Choice]:
    """Raise DataError for a loss that compares the documents of a row where no row has two."""
    (store, rows_I), *_ = sides
    loss = options.loss
    if loss != "pointwise" and (store.branches.counts[rows_I] < 2).all():
        raise DataError(
            f"{store.source(int(rows_I[0]))}: ranking.loss {loss} compares the documents of a row, and each "
            "row has one. Give a query with all its documents as one row, or use pointwise."
        )
    return []


REWARD = Task(
    name="reward",
    doc="A number for an answer, higher for the better one.",
    purpose="judge answers",
    shapes=("scored_answers",),
    heads={"causal": "sequence", "encoder": "sequence"},
    losses=lambda terms: by_branch(partial(reward_losses, options=terms.recipe.reward)),
    encoder="tunesmith.data.branch_encoders:RewardEncoder",
    record=_answered,
    is_chat=True,
    head=LabelHead(),
    answer_key="reward",
    detected="rows have several answers to a prompt, in order or with scores",
    on_overlong=("error", "the model would learn to tell a cut answer by its missing end"),
    headline_metrics=("preference_accuracy", "margin", "calibration_error"),
    next_commands=(("predict", "FILE"), ("serve",), ("show",)),
    outcome="rewards",
    rows_per_step=32,
    rates=Rates(adapter=(1e-4, 1e-4), full=(3e-5, 1e-5)),
    section=OwnSection("reward"),
)
RANK = Task(
    name="rank",
    doc="A score for a document that may answer a query.",
    purpose="rank documents",
    shapes=("ranked_documents",),
    heads={"encoder": "sequence", "causal": "sequence"},
    losses=lambda terms: by_branch(partial(ranking_losses, options=terms.recipe.ranking)),
    encoder="tunesmith.data.branch_encoders:RankingEncoder",
    record=_searched,
    head=LabelHead(takes_pairs=True),
    input_role="query",
    answer_key="score",
    detected="rows are a query with documents and their labels",
    on_overlong=("cut", "the beginning of a document shows what it is about; cut ones are counted"),
    headline_metrics=("ndcg_10", "mrr_10", "recall_1", "spearman"),
    next_commands=(("eval", "FILE"), ("serve",), ("show",)),
    outcome="lists",
    rates=EMBED.rates,
    section=OwnSection("ranking", from_rows=_refuse_single_documents),
)
