"""Rows that a run will draw, as a forecast counts them: each prompt with an answer of full length."""

# I rows

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunesmith.data.dataset import RowStore
from tunesmith.data.encode import SCHEMA
from tunesmith.data.splits import Splits
from tunesmith.recipe.distillation import Distil
from tunesmith.recipe.reinforcement import Reinforce
from tunesmith.types import Aside

OF_ANSWERS = (
    "memory and time are foreseen for answers of {:,} tokens each ({}.max_new_tokens): shorter ones take less; a probe "
    "takes them as long as they are at first"
)
USUAL_STREAMS = {"cpu": 128}
STREAMS_ON_CARD = 256


def streams_of(answers: int, device: str) -> int:
    """The value of `reinforce.streams: auto` on a device, from the answers of a draw."""
    return min(answers, USUAL_STREAMS.get(device.partition(":")[0], STREAMS_ON_CARD))


def as_answers(rows: Splits, reinforce: Reinforce, distil: Distil) -> tuple[Splits, list[str]]:
    """The training rows of a forecast, and a note where they are those that will be drawn: of task reinforce
    `reinforce.samples` rows for each prompt, one behind the other; on policy one for each row. Their store has
    lengths and targets and no tokens."""
    if rows.is_prompts:
        new, num = reinforce.max_new_tokens, reinforce.samples
        store = _answered(rows.store, np.repeat(rows.store.lengths[rows.train_rows], num), new)
        for column in ("file_index", "hashes"):
            setattr(store, column, np.repeat(getattr(rows.store, column)[rows.train_rows], num))
        answers = replace(rows, store=store, train_rows=np.arange(len(store.lengths)))
        return answers, [Aside(OF_ANSWERS.format(new, "reinforce"))]
    if distil.on_policy:
        new = distil.max_new_tokens
        store = _answered(rows.store, prompt_lengths(rows.store), new)
        return replace(rows, store=store), [Aside(OF_ANSWERS.format(new, "distil"))]
    return rows, []


def prompt_lengths(store: RowStore) -> NDArray[np.int64]:
    """[I], tokens of each row before its last answer, see `taught_answers.prompt_of`."""
    trained = pa.Table.from_batches(store.batches(), SCHEMA)["trained"].combine_chunks()
    flags, starts_I = trained.values.to_numpy(zero_copy_only=False), trained.offsets.to_numpy()[:-1]
    places = np.arange(len(flags))
    last_I = np.maximum.reduceat(np.where(flags, places, -1), starts_I)
    untrained = np.maximum.accumulate(np.where(flags, -1, places))
    lengths_I: NDArray[np.int64] = np.maximum(1, untrained[last_I] + 1 - starts_I)
    return lengths_I


def _answered(store: RowStore, prompts_I: NDArray[np.integer[Any]], new: int) -> RowStore:
    """A store with a row for each of these lengths of prompts, and `new` tokens of an answer behind each."""
    answered = copy(store)
    answered.lengths = (prompts_I + new).astype(np.int32)
    answered.targets = np.full(len(prompts_I), new, np.int32)
    answered.denominators = answered.targets.astype(np.float64)
    return answered
