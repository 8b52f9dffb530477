"""Rank: a score for a document that may answer a query.

A target is a row: a query with its documents. Its loss is a mean over documents or pairs of them, or that of its list.
"""

# B rows, L lines (one a document), K documents of a row

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.recipe.objectives import Rank, Reward
from tunesmith.tasks.embed import embedding_rate
from tunesmith.tasks.reward import reward_losses
from tunesmith.types import Batch, Measured, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tunesmith.data.renderer import EncoderSettings, RowEncoder
    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.recipe.schema import Recipe

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


def _encoder(settings: EncoderSettings) -> RowEncoder:
    from tunesmith.data.reward import RankingEncoder

    return RankingEncoder(settings.tokenizer, settings.fast, settings.limit, settings.kind)


def _record(text: str, answer: str | None = None) -> dict[str, Any]:
    if answer is None:
        return {"query": text, "document": text}
    return {"query": text, "documents": [answer, text[::-1]], "labels": [1, 0]}


def _bound(task: Task, recipe: Recipe, output: OutputLayer | None) -> Task:
    how = {"options": recipe.ranking}
    return replace(task, loss_sum=partial(task.loss_sum, **how), measure=partial(task.measure, **how))


RANK = Task(
    name="rank",
    doc="A score for a document that may answer a query.",
    shapes=("ranked_documents",),
    heads={"encoder": "sequence", "causal": "sequence"},
    loss_sum=ranking_loss_sum,
    measure=ranking_measure,
    encoder=_encoder,
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
    rate=embedding_rate,
    section="ranking",
    bound=_bound,
)
