"""Time by formula: a run as a list of kinds of work, each with a count and a price in seconds.

    price of a micro-batch = operations / operations a second + bytes moved / bytes a second + launches

The counts follow from the recipe and the rows; a probe measures the prices and keeps the counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.splits import Splits
from tunesmith.evaluation.generate import ANSWER_BATCH, new_tokens_for
from tunesmith.planning.devices import Device
from tunesmith.planning.memory import Load, Sizes
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS
from tunesmith.types import HeadName

Kind = Literal["starting", "training", "measuring", "answering", "saving", "finishing"]
"""Kinds of work in a run, and the counts of each:

    starting   once: from the start of the process to the first event, without encoding rows
    training   steps
    measuring  tokens that a device only reads: of held-out rows before, after and on the way, of training rows at the
               end, of the general text before and after, and of all rows for a reference
    answering  tokens written one after the other, before and after, if every answer is as long as it may be
    saving     checkpoints
    finishing  once: the result and its rehearsal before the first step, the report, the end of the process
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
SPREAD = 0.5
"""Share by which a total by formula alone may be off, either way."""
MOVED = 13
"""Times that a step reads or writes the inputs and outputs of the linear layers outside of matrix products."""
OPERATIONS = 150
"""Operations that a layer starts in a step."""
DECODE_LAUNCH = 1e-3
"""Seconds a layer for the next token of some answers."""
STARTING_S, LOADED = 12.0, 100e6
"""Libraries, tokenizer and plan on two cores; bytes of weights that are read and hashed in a second."""
FINISHING_S, WRITTEN = 4.0, 300e6
"""Report and end of the process on two cores; bytes that are written in a second."""


@dataclass(frozen=True, slots=True)
class Duration:
    """A whole run, from the start of its process to its end."""

    counts: Mapping[Kind, float]
    """Times that each kind of work is done."""
    prices: Mapping[Kind, float]
    """Seconds of each, once; for `training` those of a mean step."""
    spread: float = SPREAD
    """Share by which the total may be off, either way."""

    @property
    def total(self) -> float:
        return sum(count * self.prices[kind] for kind, count in self.counts.items())

    def values(self) -> dict[str, Any]:
        """As JSON."""
        priced = {kind: (count, self.prices[kind]) for kind, count in self.counts.items()}
        work = {
            kind: {"count": count, "price": price, "seconds": count * price} for kind, (count, price) in priced.items()
        }
        return {"total": self.total, "spread": self.spread, "work": work}


def targets_of(store: RowStore) -> NDArray[np.float64]:
    """[I], positions of each row whose logits are computed: of masked words those that are drawn, and one of a row with
    several classes, which the denominator of the loss counts each."""
    return store.targets.astype(float) if store.branches.has_any else np.minimum(store.denominators, store.targets)


def saves(recipe: Recipe, steps: int) -> int:
    """Checkpoints, including the one before the first step, without those of a best evaluation."""
    return 2 + (steps - 1) // resolved(recipe.checkpoint.every)


def kept_checkpoints(recipe: Recipe, steps: int) -> int:
    """Checkpoints that are on the disk at once, including the one that is being written."""
    keeps_best = recipe.evaluation.every is not None
    return min(saves(recipe, steps), recipe.checkpoint.keep + 1) + keeps_best


def counts(recipe: Recipe, rows: Splits, head: HeadName, *, steps: int, general_tokens: int) -> dict[Kind, float]:
    """Times that a run does each kind of work. `general_tokens`: 0 where the general text is not measured."""
    every = recipe.evaluation.every
    assert every != "epoch", "it is decided with the steps"
    evaluations = 2 if every is None else 2 + (steps - 1) // every + (recipe.evaluation.keep == "best")
    prompts = min(resolved(recipe.evaluation.samples), len(rows.held_rows))
    answer = new_tokens_for(rows.held_store.targets[rows.held_rows], recipe.evaluation.sample_tokens)
    devices = resolved(recipe.devices)  # among which rows are dealt; the first one computes a reference
    held, trained = rows.held_store.lengths[rows.held_rows], rows.store.lengths[rows.train_rows]
    looked_at = min(1.0, resolved(recipe.evaluation.surprising) / len(trained))
    compares = TASKS[resolved(recipe.task)].compares
    return {
        "starting": 1,
        "training": steps,
        "measuring": int(held.sum()) * (evaluations / devices + compares)
        + int(trained.sum()) * (looked_at / devices + compares)
        + 2 * general_tokens,
        "answering": 2 * -(-prompts // ANSWER_BATCH) * answer if head == "next_token" else 0,
        "saving": saves(recipe, steps),
        "finishing": 1,
    }


def pass_seconds(sizes: Sizes, load: Load, device: Device, *, recomputed: int = 0, trains: bool = True) -> float:
    """Seconds to compute `load` without starting its operations. `trains`: forward and backward, else forward alone."""
    again = recomputed / sizes.layers
    # Products: forward; backward to the inputs, from the first layer with gradients on; backward to the weights.
    times = 1 + trains * (1 - sizes.first / sizes.layers + sizes.trains_linear + again)
    operations = 2 * sizes.linear_weights * load.tokens * times
    operations += 2 * sizes.hidden * sizes.outputs * load.targets * (1 + trains * (1 + sizes.trains_output))
    # Of attention two products forward and five backward (Dao et al. 2022, appendix B.2), half of each where causal.
    operations += sizes.layers * sizes.hidden * load.squares * (2 + trains * (5 + 2 * again))
    moved = MOVED * (1 + again / 3 if trains else 1 / 3) * sizes.itemsize * sizes.features * load.tokens
    return operations / device.products + moved / device.bandwidth


def step_seconds(sizes: Sizes, load: Load, *, micro_batches: float, recomputed: int, device: Device) -> float:
    """Seconds of a step that computes `load` in so many micro-batches, and of its update."""
    update = 3 * sizes.gradients + 2 * sizes.optimizer + 1.5 * sizes.masters
    launches = micro_batches * sizes.layers * OPERATIONS * device.launch
    return pass_seconds(sizes, load, device, recomputed=recomputed) + update / device.bandwidth + launches


def prices(sizes: Sizes, load: Load, device: Device, *, result_bytes: int) -> dict[Kind, float]:
    """Seconds of each kind of work but training, once. `load`: of a mean step."""
    return {
        "starting": STARTING_S + sizes.weights / LOADED,
        "measuring": pass_seconds(sizes, load, device, trains=False) / max(1, load.tokens),
        "answering": sizes.weights / device.bandwidth + DECODE_LAUNCH * sizes.layers,
        "saving": sizes.checkpoint / WRITTEN,
        "finishing": FINISHING_S + 2 * result_bytes / WRITTEN,
    }
