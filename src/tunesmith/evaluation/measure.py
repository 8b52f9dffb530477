"""Held-out loss and token accuracy: sums over rows divided once, so that batching cannot change them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tunesmith.data.batch import build_batch, fill_passes
from tunesmith.data.store import RowStore
from tunesmith.models.modes import evaluating
from tunesmith.types import Layout, Task


@dataclass(frozen=True, slots=True)
class Score:
    """What one evaluation found."""

    loss: float
    """Nats per target."""
    token_accuracy: float
    """Share of targets that were the model's first choice."""
    rows: int
    targets: int


def evaluate(
    model: nn.Module,
    task: Task,
    *,
    store: RowStore,
    rows: Sequence[int],
    tokens_per_pass: int,
    layout: Layout,
    device: torch.device | str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """The task's measures over the given rows of a store. Sums are kept in float64; nothing random is consumed."""
    lengths = [int(n) for n in store.lengths[np.asarray(rows, np.int64)]]
    passes = fill_passes(rows, lengths, tokens_per_pass=tokens_per_pass, layout=layout)
    loss, correct, count, done = 0.0, 0, 0, 0
    with evaluating(model):
        for members in passes:
            batch = build_batch([store.row(i) for i in members], members, layout=layout, device=device)
            measured = task.measure(model, batch)
            loss += float(measured.loss_sum)
            correct += int(measured.correct)
            count += measured.count
            done += len(members)
            progress(done, len(rows))
    return Score(loss=loss / count, token_accuracy=correct / count, rows=len(rows), targets=count)
