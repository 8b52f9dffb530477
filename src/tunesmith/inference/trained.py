"""What a run was trained on, from the rows it keeps: what it is measured on should be something else."""

# I rows

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.folders import expand
from tunesmith.data.sides import split
from tunesmith.data.store import RowStore, kept
from tunesmith.errors import DataError
from tunesmith.evaluation.predict_rows import constant_answer
from tunesmith.evaluation.scores import Constant
from tunesmith.recipe.schema import DataFile, resolved
from tunesmith.runs.folder import Run
from tunesmith.types import Labels


@dataclass(frozen=True)
class Trained:
    """The rows that a run was trained on."""

    store: RowStore
    rows_I: NDArray[np.int64]

    def count(self, hashes: NDArray[np.uint64]) -> int:
        """How many of some rows, by their content hashes, are among them."""
        return int(np.isin(hashes, self.store.hashes[self.rows_I]).sum())

    def constant(self, labels: Labels | None) -> Constant | None:
        """What to answer without reading a row; see `constant_answer`."""
        return constant_answer(labels, self.store, self.rows_I)


def find_trained(run: Run) -> Trained | None:
    """None where the run's rows are gone, or were written by another release."""
    store = kept(run.rows_path / "train", run.identity().get("rows"))
    recipe = run.recipe()
    held_store = kept(run.rows_path / "held_out", run.identity().get("held-out rows")) if recipe.data.eval else store
    if store is None or held_store is None:
        return None
    try:
        num_replay = len(expand(recipe.data.replay, lambda problem: None))
    except DataError:  # a folder that is gone: which rows were the run's own cannot be told
        return None
    own = tuple(DataFile(path=path) for path in store.paths[: len(store.paths) - num_replay])
    data = recipe.data.model_copy(update={"train": own})
    train, *_ = split(data, store, held_store, resolved(recipe.task))
    return Trained(store, train)
