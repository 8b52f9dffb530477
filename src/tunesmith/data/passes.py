"""Rows grouped into passes, so that little is computed beside their tokens."""

# R rows of a step, S sides of a row

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.sharing import families
from tunesmith.types import Layout

Pass = tuple[int, ...]
"""Row indices that go through the model together."""
PASS_PLACES = 64
"""What a pass costs beside its tokens, in tokens: a small model on a processor computes so many in that time."""
MOST_READ = 4
"""Times its tokens that the rows of a pass may have where they share: each keeps the keys of what it begins with."""


def fill_passes(
    rows: Sequence[int], lengths: Sequence[int], *, tokens_per_pass: int, layout: Layout, targets: Sequence[int] = ()
) -> list[Pass]:
    """Rows grouped into passes of at most `tokens_per_pass` tokens, longest first; a longer row goes alone.

    Every row is in exactly one pass. Packed, a row joins the pass that it fills best (best-fit decreasing: Johnson et
    al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). Padded, rows of like
    length stand together, and passes count the padding. `targets`: of an encoder–decoder how many of a row's tokens its
    decoder reads, which are padded apart from the others.
    """
    if layout == "packed":
        by_length = sorted(range(len(rows)), key=lambda i: (-lengths[i], rows[i], i))
        passes = _fill_packed([lengths[i] for i in by_length], tokens_per_pass)
        return [tuple(rows[by_length[at]] for at in members) for members in passes]
    sides_RS = np.array([lengths], np.int64).T
    if targets:
        sides_RS = np.array([np.subtract(lengths, targets), targets], np.int64).T
    ways = [(*_fill_padded(sides_RS[order_R], tokens_per_pass), order_R) for order_R in _orders(sides_RS, rows)]
    _, members_of_passes, order_R = min(ways, key=lambda way: way[0])
    return [tuple(rows[i] for i in order_R[members]) for members in members_of_passes]


def copies_in(passes: Sequence[Pass]) -> list[tuple[int, ...]]:
    """The number of copies before each row of a step's passes: 0, and 1, 2, ... where its weight is above 1."""
    seen: dict[int, int] = {}

    def number(row: int) -> int:
        seen[row] = seen.get(row, -1) + 1
        return seen[row]

    return [tuple(map(number, rows)) for rows in passes]


def places(sides_RS: NDArray[np.signedinteger[Any]]) -> int:
    """What one padded pass over rows computes: each side as long as its longest."""
    return len(sides_RS) * int(sides_RS.max(0).sum())


def fill_sharing(rows: Sequence[int], ids: Sequence[NDArray[np.int32]], *, tokens_per_pass: int) -> list[Pass]:
    """Rows grouped into packed passes that compute at most `tokens_per_pass` tokens where what rows of a pass begin
    with alike is computed once; a longer row goes alone. A function of the rows, whatever their order.

    Rows that begin alike stay together as far as they fit; the groups are packed as `fill_passes` packs rows.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(ids[i]), rows[i], i))
    lengths = [len(ids[i]) for i in order]
    units: list[tuple[int, list[int]]] = []
    """(tokens, places in `order`)."""
    for family in families([ids[i] for i in order]):
        computed, read, unit = family.prefix, 0, list[int]()
        for member in family.members:
            more = computed + lengths[member] - family.prefix, read + lengths[member]
            if unit and _size(*more) > tokens_per_pass:
                units.append((_size(computed, read), unit))
                unit, more = [], (lengths[member], lengths[member])
            unit.append(member)
            computed, read = more
        units.append((_size(computed, read), unit))
    units.sort(key=lambda unit: (-unit[0], unit[1]))
    passes = _fill_packed([size for size, _ in units], tokens_per_pass)
    return [tuple(rows[order[at]] for at in sorted(at for i in members for at in units[i][1])) for members in passes]


def _size(computed: int, read: int) -> int:
    return max(computed, -(-read // MOST_READ))


def _fill_packed(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Places of `lengths`, which fall, pass by pass."""
    passes: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """(tokens left, pass), by tokens left."""
    for i, length in enumerate(lengths):
        at = bisect_left(rooms, (length, 0))
        if at < len(rooms):
            left, place = rooms.pop(at)
            passes[place].append(i)
        else:
            left, place = tokens_per_pass, len(passes)
            passes.append([i])
        insort(rooms, (left - length, place))
    return passes


def _orders(sides_RS: NDArray[np.int64], rows: Sequence[int]) -> Iterator[NDArray[np.intp]]:
    """Lines in which rows may stand before they are cut into padded passes: by length, and where they have two sides
    also by either of them first."""
    tokens_R = sides_RS.sum(1)
    yield np.lexsort((rows, -tokens_R))
    if sides_RS.shape[1] > 1:
        for side_R in sides_RS.T:
            yield np.lexsort((rows, -tokens_R, -side_R))


def _fill_padded(sides_RS: NDArray[np.int64], tokens_per_pass: int) -> tuple[float, list[slice]]:
    """Rows that stand in a line, cut into the passes that compute the fewest places, those of a pass included; and how
    many that are.

    All rows of a pass cost as much as its longest. By dynamic programming from the last row on.
    """
    num = len(sides_RS)
    costs = np.zeros(num + 1)
    """Least places of the rows from each on."""
    ends = [num] * num
    for i in range(num - 1, -1, -1):
        most = max(1, tokens_per_pass // max(1, int(sides_RS[i].sum())))
        longest = np.maximum.accumulate(sides_RS[i : i + most], axis=0).sum(1)
        sizes = np.arange(1, len(longest) + 1)
        computed = sizes * longest
        fitting = max(1, int(np.searchsorted(computed, tokens_per_pass, side="right")))
        found = PASS_PLACES + computed[:fitting] + costs[i + 1 : i + 1 + fitting]
        best = int(found.argmin())
        costs[i], ends[i] = found[best], i + 1 + best
    passes, start = [], 0
    while start < num:
        passes.append(slice(start, ends[start]))
        start = ends[start]
    return float(costs[0]), passes
