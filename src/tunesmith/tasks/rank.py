"""Rank: a score for a document that may answer a query."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tunesmith.tasks.embed import embedding_rate
from tunesmith.tasks.ranking_losses import ranking_loss_sum, ranking_measure
from tunesmith.types import Task

if TYPE_CHECKING:
    from tunesmith.data.renderer import EncoderSettings, RowEncoder
    from tunesmith.models.fused_loss import OutputLayer
    from tunesmith.recipe.schema import Recipe


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
