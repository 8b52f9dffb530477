"""Embed: vectors of texts, by which those that belong together are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.errors import DataError, RecipeError
from tunesmith.tasks.embedding_losses import ALONE, losses_of
from tunesmith.tasks.task import OwnSection, Rates, Task
from tunesmith.types import Choice, Pooling

if TYPE_CHECKING:
    from tunesmith.models.resolve_model import ModelRef
    from tunesmith.recipe.objectives import Embed
    from tunesmith.recipe.schema import Recipe
    from tunesmith.tasks.task import Side


def _from_model(recipe: Recipe, located: ModelRef) -> list[Choice]:
    """Pooling and prompts, as the model's files say."""
    from tunesmith.models.load import model_kind
    from tunesmith.models.pooling import find_pooling
    from tunesmith.models.size import model_size

    options, size = recipe.embed, model_size(located).hidden
    if wrong := [dim for dim in options.dims if dim > size]:
        raise RecipeError(f"embed.dims: {wrong[0]}: the vectors of {located.name} have {size} numbers. Use fewer.")
    named = None if located.is_gguf else find_pooling(located.path)
    why = "as the model's files say" if named else "the model's files do not say"
    pooling = named or Pooling("last" if model_kind(located) == "causal" else "mean", True)
    choices = []
    for key, value in (("pooling", pooling.kind), ("normalize", pooling.normalizes)):
        if getattr(options, key) == "auto":
            choices.append(Choice(f"embed.{key}", value, why))
    for key in ("query_prompt", "document_prompt"):
        if getattr(options, key) is None and getattr(pooling, key):
            choices.append(Choice(f"embed.{key}", getattr(pooling, key), why))
    if options.include_prompt is None and not pooling.include_prompt:
        choices.append(Choice("embed.include_prompt", False, why))
    if recipe.data.max_tokens == "auto" and pooling.max_tokens is not None:
        choices.append(Choice("data.max_tokens", min(pooling.max_tokens, model_size(located).max_tokens), why))
    return choices


def _from_rows(options: Embed, sides: Sequence[Side]) -> list[Choice]:
    """The loss that rows are made for. Raises DataError for the first row that it cannot learn from."""
    (store, rows_I), *_ = sides
    loss, choices = options.loss, []
    if loss == "auto":
        has_score = bool(store.branches.value_counts[rows_I[:1]].sum())
        has_negative = bool((store.branches.counts[rows_I[:1]] > 2).all())
        loss = ("margin" if has_negative else "cosent") if has_score else "ranking"
        what = f"{'a' if has_score else 'no'} score{' and a negative' if loss == 'margin' else ''}"
        choices.append(Choice("embed.loss", loss, f"rows have {what}"))
    needs: dict[str, tuple[int, int | None, str]] = {
        "ranking": (0, None, "an anchor, a positive and no score"), "margin": (1, 3, "one negative and a score"),
    }  # fmt: skip
    scores, texts, what = needs.get(loss, (1, 2, "two texts and a score"))
    for side, some_I in sides:
        fits_I = side.branches.value_counts[some_I] == scores
        fits_I &= texts is None or side.branches.counts[some_I] == texts
        if not fits_I.all():
            raise DataError(
                f"{side.source(int(some_I[fits_I.argmin()]))}: embed.loss {loss} learns from rows with {what}. "
                "Put other rows into another run, or set embed.loss."
            )
    return choices


EMBED = Task(
    name="embed",
    doc="Vectors of texts, by which those that belong together are found.",
    purpose="make vectors of texts",
    shapes=("text_pairs",),
    heads={"encoder": "vector", "causal": "vector"},
    losses=losses_of,
    encoder="tunesmith.data.branch_encoders:EmbeddingEncoder",
    record=lambda text, answer=None: {"anchor": text} | ({} if answer is None else {"positive": answer}),
    input_role="anchor",
    detected="rows are texts that belong together",
    on_overlong=("cut", "the beginning of a text shows what it is about; cut texts are counted"),
    headline_metrics=("recall_1", "ndcg_10", "mrr_10", "spearman"),
    next_commands=(("eval", "FILE"), ("serve",), ("show",)),
    pools=True,
    outcome="vectors",
    rows_per_step=128,
    rates=Rates(adapter=(1e-4, 1e-4), full=(5e-5, 2e-5), large=5e7),
    section=OwnSection("embed", _from_model, _from_rows, lambda options: options.loss not in ALONE),
)
