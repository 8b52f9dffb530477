"""Which rows make which step of an epoch: pure functions of (lengths, weights, seed, epoch).

So any step can be named, repeated and resumed to without replaying those before it.
"""

# I rows, R places in an epoch or a pool, S sides of a row

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

POOL_STEPS = 256
"""Steps whose rows are sorted by length together, at least; fewer if an epoch has fewer. With 64 of them, steps of
eight short texts would still compute 2.5 % of padding: benchmarks/padding.py."""


VERSION = "2"
"""Of what `sort_keys` draws: the order of rows, fractional weights and masks. A run goes on with its own or not at all.
In version 1 the order of seed s + 1 was that of seed s with every row number lowered by one."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def sort_keys(items: NDArray[np.int64], seed: int, epoch: int, *, salt: int, copy: int = 0) -> NDArray[np.uint64]:
    """One 64-bit sort key an item: splitmix64 of (seed, epoch, salt, copy, item), the same on every platform and numpy
    release.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    start = np.zeros(1, np.uint64)
    for part in (seed, epoch, salt, copy):  # each is mixed before the next is added: sums of them would meet
        start = _mixed(start + np.uint64(part % 2**64))
    return _mixed(start + items.astype(np.uint64) * _GAMMA)


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = z + _GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def copies(weights_I: NDArray[np.float64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """How often each row stands in an epoch: w times, and for a fraction w, a part of the rows of that weight."""
    whole_I = np.floor(weights_I).astype(np.int64)
    part_I = weights_I - whole_I
    for weight in np.unique(part_I[part_I > 0]):
        members = np.flatnonzero(part_I == weight)
        keys = sort_keys(members, seed, epoch, salt=1)
        extra = members[np.argsort(keys, kind="stable")[: max(1, round(float(weight) * len(members)))]]
        whole_I[extra] += 1
    return whole_I


def shuffled(weights_I: NDArray[np.float64], *, seed: int, epoch: int) -> NDArray[np.int64]:
    """[R], the rows of an epoch, each as often as it stands there, in random order."""
    rows_R = np.repeat(np.arange(len(weights_I)), copies(weights_I, seed=seed, epoch=epoch))
    return rows_R[np.argsort(sort_keys(np.arange(len(rows_R)), seed, epoch, salt=0), kind="stable")]


def pool_of(step: int, num_steps: int) -> range:
    """The steps of an epoch of so many, counted from 0, that are in the pool of this one."""
    num_pools = max(1, num_steps // POOL_STEPS)
    number = step * num_pools // num_steps
    first, last = (-(-some * num_steps // num_pools) for some in (number, number + 1))
    return range(first, last)


def grouped(
    sides_RS: NDArray[np.int32], pool: range, *, rows_per_step: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The places of each step of a pool: rows of like length make a step, and steps stand in random order.

    `sides_RS`: tokens of the pool's rows as they come shuffled, so that rows of one length are divided at random;
    [R, 2] of an encoder–decoder. Where rows are missing, the step that stands last is the short one.
    """
    steps = np.arange(pool.start, pool.stop)
    turn = np.argsort(sort_keys(steps, seed, epoch, salt=2), kind="stable")
    sizes = np.full(len(pool), rows_per_step)
    sizes[turn[-1]] -= len(pool) * rows_per_step - len(sides_RS)
    # An epoch may be one pool: so that the same rows do not meet in each, steps begin at another of the first few rows.
    shifts = np.argsort(sort_keys(np.arange(rows_per_step), seed, epoch // rows_per_step, salt=3), kind="stable")
    places_R = np.roll(in_line(sides_RS, num_steps=len(pool)), shifts[epoch % rows_per_step])
    steps_of_places = np.split(places_R, np.cumsum(sizes)[:-1])
    return [steps_of_places[i] for i in turn]


def in_line(sides_RS: NDArray[np.int32], *, num_steps: int) -> NDArray[np.int64]:
    """[R], rows in a line on which neighbours cost alike.

    Rows of one side stand by length. Those of an encoder–decoder stand in strips of like source, each sorted by target,
    up and down in turn; so many that a step is about as wide in sources as in targets, each as a share of its spread.
    """
    by_source_R = np.argsort(sides_RS[:, 0], kind="stable")
    if sides_RS.shape[1] == 1:
        return by_source_R
    strips_R = np.empty(len(sides_RS), np.int64)
    strips_R[by_source_R] = np.arange(len(sides_RS)) * _num_strips(sides_RS, num_steps) // len(sides_RS)
    targets_R = sides_RS[:, 1]
    return np.lexsort((np.where(strips_R % 2, -targets_R, targets_R), strips_R))


def _num_strips(sides_RS: NDArray[np.int32], num_steps: int) -> int:
    """√(steps · spread of sources / what is left of the spread of targets once the source is known).

    In whole numbers, so that no rounding makes another order elsewhere.
    """
    num = len(sides_RS)
    sources, targets = sides_RS.astype(np.int64).T
    source, target = int(sources.sum()), int(targets.sum())
    of_sources = num * int(sources @ sources) - source**2
    of_targets = num * int(targets @ targets) - target**2
    of_both = num * int(sources @ targets) - source * target
    left = math.sqrt(max(1, of_sources * of_targets - of_both**2))
    return min(num, max(1, int(math.sqrt(num_steps * of_sources / left))))
