"""Time by formula: a run as a list of kinds of work, each with a count and a price in seconds.

    price of a micro-batch = operations / operations a second + bytes moved / bytes a second + launches

The counts follow from the recipe and the rows; a probe measures the prices and keeps the counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.splits import Splits
from tunesmith.evaluation.generate import ANSWER_BATCH, new_tokens_for
from tunesmith.evaluation.predict_rows import sample_rows
from tunesmith.planning.devices import Device
from tunesmith.planning.memory import Load, Sizes
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS
from tunesmith.types import HeadName

Kind = Literal["starting", "training", "held_out", "surprising", "general", "answering", "saving", "finishing"]
"""Kinds of work in a run, and the counts of each:

    starting    once: from the start of the process to the first event, without encoding rows
    training    steps
    held_out    tokens of held-out rows, before and after and on the way, and of all rows for a reference
    surprising  tokens of the training rows that are measured at the end
    general     tokens of the general text, before and after
    answering   tokens written one after the other, before and after, if every answer is as long as it may be
    saving      checkpoints
    finishing   once: the result and its rehearsal before the first step, the report, the end of the process
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
DEALT: tuple[Kind, ...] = ("held_out", "surprising")
"""Kinds that several devices share."""
SPREAD = 0.5
"""Share by which a total by formula alone may be off, either way."""
MOVED = 16
"""Times that a step reads or writes the inputs and outputs of the linear layers outside of matrix products."""
OPERATIONS = 150
"""Operations that a layer starts in a step."""
LAUNCH_SHARE = 1 / 3
"""Largest share of a micro-batch that starting its operations takes on a card, where memory allows."""
CARD_TOKENS = (8192, 65536)
"""Fewest and most tokens of a micro-batch that are chosen for a card."""
DECODE_LAUNCH = 1e-3
"""Seconds a layer for the next token of some answers."""
STARTING_S, LOADED = 12.0, 100e6
"""Libraries, tokenizer and plan on two cores; bytes of weights that are read and hashed in a second."""
FINISHING_S, WRITTEN = 4.0, 300e6
"""Report and end of the process on two cores; bytes that are written in a second."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kind of work."""

    count: float
    """Times that it is done in a run."""
    price: float
    """Seconds of once."""

    @property
    def seconds(self) -> float:
        return self.count * self.price


@dataclass(frozen=True, slots=True)
class Duration:
    """A whole run, from the start of its process to its end."""

    work: Mapping[Kind, Work]
    spread: float = SPREAD
    """Share by which the total may be off, either way."""

    @property
    def total(self) -> float:
        return sum(work.seconds for work in self.work.values())

    @property
    def step(self) -> float:
        """Seconds of a mean step."""
        return self.work["training"].price

    def at(self, prices: Mapping[Kind, float], spread: float) -> Duration:
        """This work at other prices, as far as they are known."""
        work = {kind: replace(one, price=prices.get(kind, one.price)) for kind, one in self.work.items()}
        return Duration(work, spread)

    def values(self) -> dict[str, Any]:
        """As JSON."""
        work = {kind: {**asdict(one), "seconds": one.seconds} for kind, one in self.work.items()}
        return {"total": self.total, "spread": self.spread, "work": work}


def num_tokens(store: RowStore, rows_I: NDArray[np.int64]) -> tuple[int, int]:
    """Tokens and targets of these rows of a store."""
    return int(store.lengths[rows_I].sum()), int(targets_of(store)[rows_I].sum())


def targets_of(store: RowStore) -> NDArray[np.float64]:
    """[I], positions of each row whose logits are computed: of masked words those that are drawn, and one of a row with
    several classes, which the denominator of the loss counts each."""
    return store.targets.astype(float) if store.branches.has_any else np.minimum(store.denominators, store.targets)


def seen_rows(recipe: Recipe, rows: Splits) -> NDArray[np.int64]:
    """The training rows that are measured at the end."""
    return sample_rows(rows.store, rows.train_rows, resolved(recipe.evaluation.surprising))


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
    held = num_tokens(rows.held_store, rows.held_rows)[0]
    reference = held + num_tokens(rows.store, rows.train_rows)[0] if TASKS[resolved(recipe.task)].compares else 0
    words = -(-prompts // ANSWER_BATCH) * answer
    return {
        "starting": 1,
        "training": steps,
        "held_out": evaluations * held + reference,
        "surprising": num_tokens(rows.store, seen_rows(recipe, rows))[0],
        "general": 2 * general_tokens,
        "answering": 2 * words if head == "next_token" else 0,
        "saving": saves(recipe, steps),
        "finishing": 1,
    }


def step_seconds(sizes: Sizes, load: Load, *, micro_batches: float, recomputed: int, device: Device) -> float:
    """Seconds of a step that computes `load` in so many micro-batches, and of its update."""
    layers = max(1, len(sizes.features_L))
    again = recomputed / layers
    # Products: forward; backward to the inputs, from the first layer with gradients on; backward to the weights.
    times = 1 + (1 - sizes.first / layers) + sizes.trains_linear + again
    operations = 2 * sizes.linear_weights * load.tokens * times
    operations += 2 * sizes.hidden * sizes.outputs * load.targets * (2 + sizes.trains_output)
    # Of attention two products forward and five backward (Dao et al. 2022, appendix B.2), half of each where causal.
    operations += layers * sizes.hidden * load.squares * (7 + 2 * again)
    moved = MOVED * (1 + again / 3) * sizes.itemsize * sum(sizes.features_L) * load.tokens
    update = 3 * sizes.gradients + 2 * sizes.optimizer + 1.5 * sizes.masters
    launches = micro_batches * layers * OPERATIONS * device.launch
    return operations / device.products + (moved + update) / device.bandwidth + launches


def card_tokens(sizes: Sizes, device: Device) -> int:
    """Tokens of a micro-batch whose products and copies take long enough on a card to hide the start of its operations:
    a power of two in `CARD_TOKENS`."""
    fewest, most = CARD_TOKENS
    if not device.products:
        return fewest
    none, some = (
        step_seconds(sizes, Load(tokens, 0), micro_batches=0, recomputed=0, device=device) for tokens in (0, most)
    )
    launches = len(sizes.features_L) * OPERATIONS * device.launch
    wanted = launches * (1 - LAUNCH_SHARE) / LAUNCH_SHARE / ((some - none) / most)
    return max(fewest, min(most, 1 << math.ceil(math.log2(max(1.0, wanted)))))


def token_seconds(sizes: Sizes, tokens: int, targets: int, device: Device) -> float:
    """Seconds of a token of rows that are measured, which have so many tokens and targets; 0 where there are none."""
    if not tokens:
        return 0.0
    operations = 2 * (sizes.linear_weights + sizes.hidden * sizes.outputs * targets / tokens)
    moved = MOVED / 3 * sizes.itemsize * sum(sizes.features_L) + 10 * sizes.outputs * targets / tokens
    return operations / device.products + moved / device.bandwidth


def prices(sizes: Sizes, rows: Splits, recipe: Recipe, device: Device, *, result_bytes: int) -> dict[Kind, float]:
    """Seconds of each kind of work but training, once."""
    held = num_tokens(rows.held_store, rows.held_rows)
    return {
        "starting": STARTING_S + sizes.weights / LOADED,
        "held_out": token_seconds(sizes, *held, device),
        "surprising": token_seconds(sizes, *num_tokens(rows.store, seen_rows(recipe, rows)), device),
        "general": token_seconds(sizes, 1, 1, device),
        "answering": sizes.weights / device.bandwidth + DECODE_LAUNCH * len(sizes.features_L),
        "saving": sizes.checkpoint / WRITTEN,
        "finishing": FINISHING_S + 2 * result_bytes / WRITTEN,
    }
