"""Rows that are to be drawn, as a forecast counts them: each answer as long as it may be, with its prompt."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import numpy as np

from tunesmith.data.splits import Splits
from tunesmith.recipe.reinforcement import Reinforce

OF_ANSWERS = (
    "memory and time are foreseen for answers of {:,} tokens each (reinforce.max_new_tokens) that share nothing: "
    "shorter ones, and prompts that are computed once, take less; the time of the grader is not in it"
)
ON_POLICY = (
    "memory and time are foreseen for the rows as they are and for the teacher's weights: what drawing answers and "
    "having them read takes (distil.on_policy) is not in it"
)
STREAMS = {"cpu": 128}
STREAMS_ON_CARD = 256


def streams_of(answers: int, device: str) -> int:
    """The value of `reinforce.streams: auto` on a device, from the answers of a draw."""
    return min(answers, STREAMS.get(device.partition(":")[0], STREAMS_ON_CARD))


def as_answers(rows: Splits, options: Reinforce) -> Splits:
    """The training rows of a forecast: `reinforce.samples` rows for each prompt, one behind the other, in a
    store that has lengths and targets and no tokens."""
    num, new = options.samples, options.max_new_tokens
    store = copy(rows.store)
    lengths_I = rows.store.lengths[rows.train_rows]
    store.lengths = np.repeat(lengths_I + new, num).astype(np.int32)
    store.targets = np.full(len(store.lengths), new, np.int32)
    store.denominators = store.targets.astype(np.float64)
    for column in ("file_index", "hashes"):
        setattr(store, column, np.repeat(getattr(rows.store, column)[rows.train_rows], num))
    held = rows.store if rows.held_store is rows.store else rows.held_store
    return replace(rows, store=store, held_store=held, train_rows=np.arange(len(store.lengths)))
