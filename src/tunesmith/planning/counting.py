"""How often a run does each kind of work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.splits import Splits
from tunesmith.evaluation.forgetting import ANSWER_TOKENS
from tunesmith.evaluation.generate import ANSWER_BATCH, new_tokens_for
from tunesmith.evaluation.predict_rows import sample_rows
from tunesmith.planning.work import Kind
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.types import HeadName


@dataclass(frozen=True, slots=True)
class Amount:
    """Of some rows."""

    tokens: int
    targets: int


def amount(store: RowStore, rows_I: NDArray[np.int64]) -> Amount:
    """Of these rows of a store."""
    return Amount(int(store.lengths[rows_I].sum()), int(store.denominators[rows_I].sum()))


def seen_rows(recipe: Recipe, rows: Splits) -> NDArray[np.int64]:
    """The training rows that are looked through at the end."""
    return sample_rows(rows.store, rows.train_rows, resolved(recipe.evaluation.surprising))


def evaluations(recipe: Recipe, steps: int) -> int:
    """Of held-out rows: before, after, and on the way."""
    every = recipe.evaluation.every
    if every is None:
        return 2
    return 2 + (steps - 1) // every + (recipe.evaluation.keep == "best")


def saves(recipe: Recipe, steps: int) -> int:
    """Checkpoints, the one before the first step among them; those of a best evaluation cannot be foreseen."""
    return 2 + (steps - 1) // resolved(recipe.checkpoint.every)


def kept_checkpoints(recipe: Recipe, steps: int) -> int:
    """Checkpoints that are on the disk at once, the one that is being written among them."""
    is_measured = recipe.evaluation.every is not None  # then the best one is kept too
    return min(saves(recipe, steps), recipe.checkpoint.keep + 1) + is_measured


def words(recipe: Recipe, rows: Splits, head: HeadName, *, is_general: bool) -> int:
    """Tokens written one after the other before and after, if no answer ends early."""
    if head != "next_token":
        return 0
    asked = min(resolved(recipe.evaluation.samples), len(rows.held_rows))
    general = ANSWER_TOKENS if is_general else 0
    tokens = new_tokens_for(rows.held_store.targets[rows.held_rows], recipe.evaluation.sample_tokens)
    return 2 * (-(-asked // ANSWER_BATCH) * tokens + general)


def counts(recipe: Recipe, rows: Splits, head: HeadName, *, steps: int, general_tokens: int) -> dict[Kind, float]:
    """Of a run of so many steps. `general_tokens`: of the general text; 0 where it is not measured."""
    return {
        "starting": 1,
        "training": steps,
        "held_out": evaluations(recipe, steps) * amount(rows.held_store, rows.held_rows).tokens,
        "surprising": amount(rows.store, seen_rows(recipe, rows)).tokens,
        "general": 2 * general_tokens,
        "answering": words(recipe, rows, head, is_general=general_tokens > 0),
        "saving": saves(recipe, steps),
        "finishing": 1,
    }
