"""What a model makes of rows: each row's losses and answers, so that every measure is a function of one pass."""

# I rows

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tunesmith.data.feed import Feed, passes_of
from tunesmith.data.labels import count_classes, see
from tunesmith.data.store import RowStore
from tunesmith.evaluation.outcomes import Constant, Outcomes
from tunesmith.models.modes import evaluating
from tunesmith.types import Labels, Task


def evaluate(
    model: nn.Module,
    task: Task,
    feed: Feed,
    rows: Sequence[int],
    *,
    tokens_per_pass: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcomes:
    """The outcome of every given row of the feed's store, in the order given.

    How rows are cut into passes changes nothing, and no random number of the loop is consumed: what is masked follows
    from the row alone.
    """
    store = feed.store
    place = {row: i for i, row in enumerate(rows)}
    losses_I = np.zeros(len(rows))
    outputs: list[NDArray[np.generic]] = [np.empty(0)] * len(rows)
    targets: list[NDArray[np.generic]] = [np.empty(0)] * len(rows)
    done = 0
    with evaluating(model):
        for members in passes_of(store, rows, tokens_per_pass=tokens_per_pass, layout=feed.layout):
            batch = feed.batch(members, draw=0)
            measured = task.measure(model, batch)
            losses_N = measured.losses_N.double().cpu().numpy()
            row_of_N = batch.row_of_N.cpu().numpy()
            sums = np.bincount(row_of_N, losses_N, minlength=len(members))
            cuts = np.flatnonzero(np.diff(row_of_N)) + 1
            for b, (out, target) in enumerate(
                zip(
                    np.split(measured.outputs_N.cpu().numpy(), cuts),
                    np.split(batch.targets_N.cpu().numpy(), cuts),
                    strict=True,
                )
            ):
                i = place[members[b]]
                losses_I[i], outputs[i], targets[i] = sums[b], out, target
            done += len(members)
            progress(done, len(rows))
    index = np.asarray(rows, np.int64)
    return Outcomes(
        losses_I=losses_I,
        counts_I=store.denominators[index],
        num_bytes_I=store.num_bytes[index].astype(np.int64),
        outputs=outputs,
        targets=targets,
    )


def constant_of(labels: Labels | None, store: RowStore, rows_I: NDArray[np.int64]) -> Constant | None:
    """What to answer without reading a row, by the labels of some rows: their commonest class (of tags: the commonest
    tag), of rows with any number of classes each class's commonest answer, or the mean of their numbers."""
    if labels is None or len(rows_I) == 0:
        return None
    if labels.kind == "number":
        seen = see(store, rows_I)
        return float(np.average([float(name) for name in seen.names], weights=seen.counts_V))
    counts_C = count_classes(labels, store, rows_I)
    return counts_C * 2 > len(rows_I) if labels.kind == "many" else int(counts_C.argmax())
