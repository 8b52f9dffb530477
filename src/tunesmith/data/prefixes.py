"""Prefixes that rows of a micro-batch share, so that a causal model computes them once.

The states of a causal model at a token follow from the tokens up to it alone: rows with one prefix have the
same states there, and the gradients of their losses add up. Nothing is approximated. The idea for preference
pairs: Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305.

Tokens alone would make every image alike. So rows are compared by `prefix_keys`.
"""

# T tokens of one row

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.types import LEAST_PREFIX, Batch, BatchImage, Row, Segment, Span

Keys = NDArray[np.integer[Any]]
"""A number for each token of a row, see `prefix_keys`."""
MOST_ROWS_GROUPED = 512
"""Rows looked at together: the search for the best groups costs their square."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that are computed once."""

    start: int
    """The first of them in their rows."""
    stop: int
    members: tuple[int, ...]
    """The rows, which are alike up to `stop`."""


def prefix_keys(row: Row, image_token: int | None) -> Keys:
    """[T], numbers by which a row is compared with others: its tokens, and at its first image a negative number
    that stands for all its images and what is between them. So a shared prefix has all images of its rows, or
    none.

    `image_token`: the token in the places of images; None: the model reads none.
    """
    if not row.images:
        return row.ids
    places = np.flatnonzero(row.ids == image_token)
    first, last = int(places[0]), int(places[-1])
    content = np.array(row.images, np.uint64).tobytes() + row.ids[first : last + 1].tobytes()
    keys = row.ids.astype(np.int64)
    keys[first] = -1 - int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
    return keys


def share_prefixes(batch: Batch, rows: Sequence[Row], *, image_token: int | None = None) -> Batch:
    """A packed batch of these whole rows with shared prefixes computed once; the same batch if there are none.

    Rows, targets and their order stay; positions change, and an image of a shared prefix is there once. For
    causal models. `image_token`: see `prefix_keys`.
    """
    row_keys = [prefix_keys(row, image_token) for row in rows]
    shared = stretches(row_keys)
    if len(shared) == len(rows):
        return batch
    ids, positions, pieces, end = [], [], [], 0
    images: list[BatchImage] = []
    image_ends = list(accumulate((len(row.images) for row in rows), initial=0))
    spans: list[tuple[Span, ...]] = [()] * len(rows)
    """Places of the tokens of each row."""
    for stretch in shared:
        first, num = stretch.members[0], stretch.stop - stretch.start
        ids.append(rows[first].ids[stretch.start : stretch.stop])
        if (row_keys[first][stretch.start : stretch.stop] < 0).any():
            images += batch.images[image_ends[first] : image_ends[first + 1]]
        positions.append(np.arange(stretch.start, stretch.stop))
        pieces.append(Segment(num, spans[first]))
        for i in stretch.members:
            spans[i] = (*spans[i], (end, num))
        end += num
    places = [np.arange(start, start + num) for row in spans for start, num in row]
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
        images=tuple(images),
    )


def prefix_groups(rows: Sequence[Keys]) -> list[Stretch]:
    """Group rows by prefix so that the fewest tokens are computed; every row is longer than its group's prefix,
    which is empty for a row on its own.

    A function of the rows alone. Groups are in the order of their first member, members in the order given.
    """
    order = _sorted(rows)
    groups: list[Stretch] = []
    for at in range(0, len(order), MOST_ROWS_GROUPED):
        groups += _best(rows, order[at : at + MOST_ROWS_GROUPED])
    return sorted(groups, key=lambda group: group.members)


def num_computed(rows: Sequence[Keys]) -> int:
    """Tokens that a micro-batch of these rows computes."""
    return _total(stretches(rows))


def stretches(rows: Sequence[Keys]) -> list[Stretch]:
    """Stretches that a micro-batch of these rows computes, prefixes first; as many as rows if none share.

    Groups as `prefix_groups` finds them, or prefixes within prefixes where that computes fewer tokens: a system
    prompt that all rows begin with, then the prompts of two answers each.
    """
    flat = []
    for group in prefix_groups(rows):
        flat += [group] if group.stop else []
        flat += [Stretch(group.stop, len(rows[i]), (i,)) for i in group.members]
    return min(flat, _nested(rows), key=_total)


def _total(groups: Sequence[Stretch]) -> int:
    return sum(group.stop - group.start for group in groups)


def _nested(rows: Sequence[Keys]) -> list[Stretch]:
    """The tree of the sorted rows' prefixes, of which each is LEAST_PREFIX longer than the one before it."""
    order = _sorted(rows)
    common = [_common(rows[a], rows[b]) for a, b in pairwise(order)]

    def cut(first: int, stop: int, depth: int) -> list[tuple[int, int, int]]:
        ends = [at + 1 for at in range(first, stop - 1) if common[at] < depth + LEAST_PREFIX]
        return [(*ends_of_group, depth) for ends_of_group in pairwise([first, *ends, stop])][::-1]

    tree, left = [], cut(0, len(order), 0)
    while left:
        first, stop, depth = left.pop()
        prefix = min(common[first : stop - 1], default=len(rows[order[first]]))
        tree.append(Stretch(depth, prefix, tuple(sorted(order[first:stop]))))
        left += cut(first, stop, prefix) if stop - first > 1 else []
    return tree


def _sorted(rows: Sequence[Keys]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: (rows[i].astype(">i8").tobytes(), i))


def _best(rows: Sequence[Keys], order: Sequence[int]) -> list[Stretch]:
    """The way to cut sorted rows into groups of neighbours that saves the most tokens."""
    common = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    saved, cuts = [0], [(0, 0)]
    """For the first n rows: the most that can be saved, and the start of their last group with its prefix."""
    for stop in range(1, len(order) + 1):
        best, cut = saved[stop - 1], (stop - 1, 0)
        prefix = len(rows[order[stop - 1]]) - 1
        for start in range(stop - 2, -1, -1):
            prefix = min(prefix, common[start])
            if prefix < LEAST_PREFIX:
                break
            if (saves := saved[start] + (stop - start - 1) * prefix) > best:
                best, cut = saves, (start, prefix)
        saved.append(best)
        cuts.append(cut)
    groups, stop = [], len(order)
    while stop:
        start, prefix = cuts[stop]
        groups.append(Stretch(0, prefix, tuple(sorted(order[start:stop]))))
        stop = start
    return groups


def _common(a_T: Keys, b_T: Keys) -> int:
    """Length of the common prefix, without the last token of either row."""
    shorter = min(len(a_T), len(b_T)) - 1
    different = np.flatnonzero(a_T[:shorter] != b_T[:shorter])
    return int(different[0]) if len(different) else shorter
