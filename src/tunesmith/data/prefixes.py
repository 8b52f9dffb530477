"""Prefixes that rows of a micro-batch share, so that a causal model computes them once.

The states of a causal model at a token follow from the tokens up to it alone: rows with one prefix have the same states
there, and the gradients of their losses add up. Nothing is approximated. The idea for preference pairs:
Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305.
"""

# T tokens of one row

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.types import LEAST_PREFIX, Batch, Segment

MOST_ROWS = 512
"""Rows looked at together: the search for the best groups costs their square."""


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Rows of a micro-batch that begin with the same tokens."""

    prefix: int
    """Number of shared tokens; 0 for a row on its own."""
    members: tuple[int, ...]


def share_prefixes(batch: Batch, rows: Sequence[NDArray[np.int32]]) -> Batch:
    """A packed batch of these whole rows with shared prefixes computed once; the same batch if there are none.

    Rows, targets and their order stay; only positions change. For causal models.
    """
    ids, positions, pieces, end = [], [], [], 0
    places = [np.arange(0)] * len(rows)
    """Positions of the tokens of each row."""

    def place(tokens: NDArray[np.int32], piece: Segment) -> NDArray[np.int64]:
        nonlocal end
        ids.append(tokens)
        positions.append(np.arange(piece.prefix, piece.keys))
        pieces.append(piece)
        end += piece.tokens
        return np.arange(end - piece.tokens, end)

    for group in prefix_groups(rows):
        start, prefix = end, group.prefix
        first = place(rows[group.members[0]][:prefix], Segment(prefix)) if prefix else np.arange(0)
        for i in group.members:
            rest = rows[i][prefix:]
            places[i] = np.concatenate([first, place(rest, Segment(len(rest), prefix, start if prefix else 0))])
    if len(pieces) == len(rows):
        return batch
    assert batch.layout == "packed"
    assert batch.types_BT is None

    def tensor(parts: Sequence[NDArray[np.generic]]) -> Tensor:
        made, device = torch.from_numpy(np.concatenate(parts).astype(np.int64)), batch.ids_BT.device
        return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)

    return replace(
        batch,
        ids_BT=tensor(ids)[None],
        positions_BT=tensor(positions)[None],
        predict_N=tensor(places)[batch.predict_N],
        pieces=tuple(pieces),
    )


def prefix_groups(rows: Sequence[NDArray[np.int32]]) -> list[PrefixGroup]:
    """Group rows by prefix so that the fewest tokens are computed; every row is longer than its group's prefix.

    A function of the rows alone. Groups are in the order of their first member, members in the order given.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].astype(">i4").tobytes(), i))
    found: list[PrefixGroup] = []
    for at in range(0, len(order), MOST_ROWS):
        found += _best(rows, order[at : at + MOST_ROWS])
    return sorted(found, key=lambda group: group.members)


def num_computed(rows: Sequence[NDArray[np.int32]]) -> int:
    """Tokens that a micro-batch of these rows computes."""
    return sum(group.prefix + sum(len(rows[i]) - group.prefix for i in group.members) for group in prefix_groups(rows))


def _best(rows: Sequence[NDArray[np.int32]], order: Sequence[int]) -> list[PrefixGroup]:
    """The way to cut sorted rows into groups of neighbours that saves the most tokens."""
    common = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    saved, cuts = [0], [(0, 0)]
    """For the first n rows: the most that can be saved, and the start of their last group with its prefix."""
    for stop in range(1, len(order) + 1):
        best, cut = saved[stop - 1], (stop - 1, 0)
        prefix = len(rows[order[stop - 1]]) - 1
        for start in range(stop - 2, -1, -1):
            prefix = min(prefix, common[start], len(rows[order[start]]) - 1)
            if prefix < LEAST_PREFIX:
                break
            if (saves := saved[start] + (stop - start - 1) * prefix) > best:
                best, cut = saves, (start, prefix)
        saved.append(best)
        cuts.append(cut)
    found, stop = [], len(order)
    while stop:
        start, prefix = cuts[stop]
        found.append(PrefixGroup(prefix, tuple(sorted(order[start:stop]))))
        stop = start
    return found


def _common(a_T: NDArray[np.int32], b_T: NDArray[np.int32]) -> int:
    """Length of the common prefix."""
    shorter = min(len(a_T), len(b_T))
    different = np.flatnonzero(a_T[:shorter] != b_T[:shorter])
    return int(different[0]) if len(different) else shorter
