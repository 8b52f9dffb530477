"""Ragged passes filled up to whole sizes, so that what a processor compiled for one pass serves others.

In bfloat16 every product is compiled for its shape, and the number of tokens of a pass hardly ever comes again. So a
few tokens are put behind its rows, as a row of their own that nothing is learnt from: on short rows of an encoder
compiling was a quarter of a step.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from tunesmith.data.batch import Plan
from tunesmith.types import Batch, Layout

WHOLE = 32
"""Tokens that the size of a filled pass is a multiple of: an eighth of a pass of short rows, nothing of a large one."""


def fills(layout: Layout, *, device: str, precision: str) -> bool:
    """Whether passes are filled: where they are packed and products are compiled for their shapes."""
    return layout == "packed" and device == "cpu" and precision == "bfloat16"


def filled(num_tokens: int) -> int:
    """Tokens of a pass once it is filled."""
    return -(-num_tokens // WHOLE) * WHOLE


def padding_share(plan: Plan, *, fills: bool) -> float:
    """Of the places computed in the first steps of a run, those that hold no token of a row."""
    return filling_share(plan) if fills else plan.padding()


def filling_share(plan: Plan, most_steps: int = 64) -> float:
    """Of the places computed in the first steps of a run, where passes are filled."""
    steps = range(1, min(most_steps, plan.steps_per_epoch) + 1)
    sizes = [plan.computed(rows) for step in steps for rows in plan.step(step)]
    return 1.0 - sum(sizes) / sum(map(filled, sizes))


def fill(batch: Batch) -> Batch:
    """A packed batch with a row of fewer than `WHOLE` tokens behind it, which no target is in and no other row reads.

    They are the last token again, which is one of the data: others may have no row in an embedding that is trained in
    part.
    """
    num_tokens = batch.ids_BT.shape[1]
    num = filled(num_tokens) - num_tokens
    if num == 0:
        return batch
    positions_T = batch.positions_BT.new_tensor(range(num))
    return replace(
        batch,
        ids_BT=F.pad(batch.ids_BT, (0, num), value=int(batch.ids_BT[0, -1])),
        positions_BT=F.pad(batch.positions_BT, (0, num)).index_copy_(1, positions_T + num_tokens, positions_T[None]),
        types_BT=None if batch.types_BT is None else F.pad(batch.types_BT, (0, num)),
        filling=num,
    )
