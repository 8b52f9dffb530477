"""Beginnings that rows of a pass have in common, so that a causal model computes them once.

What a causal model makes of a token follows from the tokens up to it alone: rows that begin alike have the same states
there, and the gradients of all that is learnt from them add up. Nothing is approximated. The idea for preference pairs:
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

from tunesmith.types import Batch, Piece

LEAST_TOKENS = 8
"""A shorter beginning is not worth the piece of its own."""
MOST_ROWS = 512
"""Of a pass with more rows they are looked at in so many at a time: finding the best families costs their square."""


@dataclass(frozen=True, slots=True)
class Family:
    """Rows of a pass that begin with the same tokens."""

    prefix: int
    """How many; 0 for a row on its own."""
    members: tuple[int, ...]


def share(batch: Batch, rows: Sequence[NDArray[np.int32]]) -> Batch:
    """A packed batch of these whole rows with what they share computed once; the same batch if they share nothing.

    Rows, targets and their order stay; what changes is where they stand. For causal models.
    """
    ids, positions, pieces, end = [], [], [], 0
    places = [np.arange(0)] * len(rows)
    """Of each row where its tokens stand."""

    def stand(tokens: NDArray[np.int32], piece: Piece) -> NDArray[np.int64]:
        nonlocal end
        ids.append(tokens)
        positions.append(np.arange(piece.prefix, piece.keys))
        pieces.append(piece)
        end += piece.tokens
        return np.arange(end - piece.tokens, end)

    for family in families(rows):
        start, prefix = end, family.prefix
        first = stand(rows[family.members[0]][:prefix], Piece(prefix)) if prefix else np.arange(0)
        for i in family.members:
            rest = rows[i][prefix:]
            places[i] = np.concatenate([first, stand(rest, Piece(len(rest), prefix, start if prefix else 0))])
    if len(pieces) == len(rows):
        return batch
    assert batch.layout == "packed"
    assert batch.types_BT is None

    def tensor(parts: Sequence[NDArray[np.generic]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(batch.ids_BT.device)

    return replace(
        batch,
        ids_BT=tensor(ids)[None],
        positions_BT=tensor(positions)[None],
        predict_N=tensor(places)[batch.predict_N],
        pieces=tuple(pieces),
    )


def families(rows: Sequence[NDArray[np.int32]]) -> list[Family]:
    """The rows in families, so that the fewest tokens are computed; every row is longer than its family's beginning.

    A function of the rows alone. Families stand in the order of their first member, members in the order given.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].astype(">i4").tobytes(), i))
    found: list[Family] = []
    for at in range(0, len(order), MOST_ROWS):
        found += _best(rows, order[at : at + MOST_ROWS])
    return sorted(found, key=lambda family: family.members)


def num_computed(rows: Sequence[NDArray[np.int32]]) -> int:
    """Tokens that a pass over these rows computes."""
    return sum(family.prefix + sum(len(rows[i]) - family.prefix for i in family.members) for family in families(rows))


def _best(rows: Sequence[NDArray[np.int32]], order: Sequence[int]) -> list[Family]:
    """Of all ways to cut the sorted rows into neighbours, the one that saves the most tokens."""
    common = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    saved, cuts = [0], [(0, 0)]
    """Of the first n rows: the most that can be saved, and where their last family begins, with its prefix."""
    for stop in range(1, len(order) + 1):
        best, cut = saved[stop - 1], (stop - 1, 0)
        prefix = len(rows[order[stop - 1]]) - 1
        for start in range(stop - 2, -1, -1):
            prefix = min(prefix, common[start], len(rows[order[start]]) - 1)
            if prefix < LEAST_TOKENS:
                break
            if (saves := saved[start] + (stop - start - 1) * prefix) > best:
                best, cut = saves, (start, prefix)
        saved.append(best)
        cuts.append(cut)
    found, stop = [], len(order)
    while stop:
        start, prefix = cuts[stop]
        found.append(Family(prefix, tuple(sorted(order[start:stop]))))
        stop = start
    return found


def _common(a_T: NDArray[np.int32], b_T: NDArray[np.int32]) -> int:
    """Tokens that both begin with."""
    shorter = min(len(a_T), len(b_T))
    different = np.flatnonzero(a_T[:shorter] != b_T[:shorter])
    return int(different[0]) if len(different) else shorter
