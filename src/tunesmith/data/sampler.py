"""Rows of each step, and their division into micro-batches, which go through the model together.

All of it is a pure function of (lengths, weights, seed, epoch), so any step can be named, repeated and resumed
to without replaying those before it.
"""

# I rows, R places in an epoch, a pool or a step, B rows of a micro-batch, S sides of a row

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.prefixes import Keys, num_computed, prefix_groups
from tunesmith.parallel.shares import shares
from tunesmith.types import Layout

if TYPE_CHECKING:
    from tunesmith.data.dataset import RowStore

MicroBatch = tuple[int, ...]
"""Indices of the rows that go through the model together in one forward and backward."""
MICRO_BATCH_COST, COST_ON_CARD = 64, 4096
"""Cost of a micro-batch in addition to its tokens, on a processor and on a card. It is counted in tokens: as
many as a small model computes in the time that a micro-batch takes to start, 40 to 90 ms on a card."""
MOST_READ = 4
"""Limit where prefixes are shared: the whole rows of a micro-batch may have this many times the tokens that are
computed. Each row keeps the keys of its prefix in memory, though the prefix is computed once."""
MULTIPLE = 32
"""The tokens of a padded packed micro-batch are a multiple of this. Padding is up to an eighth of a micro-batch
of short rows, and next to nothing of a large one."""
ORDER_VERSION = "2"
"""Version of the numbers of `sort_keys`, by which rows are ordered and tokens masked: a run resumes with the
same version only. In version 1, seed s + 1 gave the order of seed s with every row number lowered by one."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class StepSampler:
    """Chooses the rows of every step of a run and groups them into micro-batches.

    `rows_I` holds the store's row indices that are trained on, `weights_I` how often each is seen in an epoch,
    `lengths_I` their tokens.
    """

    rows_I: NDArray[np.int64]
    weights_I: NDArray[np.float64]
    lengths_I: NDArray[np.int32]
    rows_per_step: int
    tokens_per_pass: int
    layout: Layout
    seed: int
    targets_I: NDArray[np.int32] | None = None
    """For an encoder–decoder: tokens of each row that its decoder reads, which are padded apart from others."""
    sources_I: NDArray[np.int64] | None = None
    """Number of each row's source. A weight such as 0.5 takes this fraction of each source; None: of all rows
    with this weight, whatever their source."""
    keys_of: Callable[[int], Keys] | None = field(default=None, compare=False)
    """Returns a row's `prefix_keys` where shared prefixes are computed once: micro-batches are then filled by
    the tokens that are computed. None: rows are computed whole."""
    part: tuple[int, int] = (0, 1)
    """(rank, size): this process, and the number of processes. `step` returns its share of a step."""
    pass_cost: int = MICRO_BATCH_COST
    """Cost of a micro-batch besides its tokens, in tokens, see `pass_cost`."""
    equal_passes: bool = False
    """Whether every process has to run as many micro-batches of a step as the others; see `idle`."""
    _cache: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """A cache: it holds what follows from the other fields alone."""

    @property
    def rows_per_epoch(self) -> int:
        if "rows_per_epoch" not in self._cache:
            self._cache["rows_per_epoch"] = int(copies(self.weights_I, self.sources_I, seed=self.seed, epoch=0).sum())
        return int(self._cache["rows_per_epoch"])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.rows_per_step)

    def rows(self, step: int) -> list[int]:
        """All rows of an optimizer step, counted from 1: the same for any number of processes."""
        epoch, offset = divmod(step - 1, self.steps_per_epoch)
        rows: list[int] = self.rows_I[self._chosen(epoch, offset)].tolist()
        return rows

    def step(self, step: int) -> list[MicroBatch]:
        """Micro-batches of this part of an optimizer step, counted from 1; none if there are too few rows."""
        return self._part(step, self.part[0])

    def idle(self, step: int) -> list[MicroBatch]:
        """Micro-batches of one row that this part computes in addition, to no effect, where `equal_passes`."""
        rank, size = self.part
        if not self.equal_passes or size == 1:
            return []
        numbers = [len(self._part(step, other)) for other in range(size)]
        return [(self.rows(step)[0],)] * (max(numbers) - numbers[rank])

    def _part(self, step: int, rank: int) -> list[MicroBatch]:
        rows, size = self.rows(step), self.part[1]
        if size > 1:
            units = self._units(rows)
            mine = shares([cost for cost, _ in units], size)[rank]
            rows = [rows[at] for at in sorted(at for unit in mine for at in units[unit][1])]
        if not rows:
            return []
        if self.keys_of is not None:
            return make_sharing_micro_batches(
                rows, [self.keys_of(row) for row in rows], tokens_per_pass=self.tokens_per_pass
            )
        return make_micro_batches(
            rows,
            self.lengths_of(rows),
            tokens_per_pass=self.tokens_per_pass,
            layout=self.layout,
            cost=self.pass_cost,
            targets=() if self.targets_I is None else self._sides_of(rows)[:, 1].tolist(),
        )

    def _units(self, rows: Sequence[int]) -> list[tuple[int, list[int]]]:
        """(tokens, places in `rows`) of what one process computes: copies of a row, so that `copies_in` numbers
        them, and rows with one prefix, unless they are more than a fair share."""
        lengths, copies = self.lengths_of(rows), dict[int, list[int]]()
        for at, row in enumerate(rows):
            copies.setdefault(row, []).append(at)
        alone = [(sum(lengths[at] for at in places), places) for places in copies.values()]
        if self.keys_of is None:
            return alone
        firsts = [places[0] for places in copies.values()]
        units: list[tuple[int, list[int]]] = []
        for group in prefix_groups([self.keys_of(rows[at]) for at in firsts]):
            members = [alone[i] for i in group.members]
            tokens = sum(cost for cost, _ in members)
            places = [at for _, member_places in members for at in member_places]
            tokens -= group.stop * (len(places) - 1) if group.stop else 0
            is_large = tokens * self.part[1] > sum(lengths)
            units += members if is_large else [(tokens, places)]
        return units

    def computed(self, rows: MicroBatch) -> int:
        """Positions that a micro-batch of these rows computes, padding included."""
        if self.keys_of is not None:
            return num_computed([self.keys_of(row) for row in rows])
        sides_BS = self._sides_of(rows)
        return int(sides_BS.sum()) if self.layout == "packed" else len(rows) * int(sides_BS.max(0).sum())

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """Tokens of each of these training rows."""
        lengths: list[int] = self._sides_of(rows).sum(1).tolist()
        return lengths

    def _sides_of(self, rows: Sequence[int]) -> NDArray[np.int32]:
        """Tokens of these rows, [B, S]: source and target apart for an encoder–decoder."""
        if "sides" not in self._cache:
            sides = [self.lengths_I] if self.targets_I is None else [self.lengths_I - self.targets_I, self.targets_I]
            self._cache["sides"] = np.zeros((int(self.rows_I.max()) + 1, len(sides)), np.int32)
            self._cache["sides"][self.rows_I] = np.stack(sides, axis=1)
        sides_of_rows: NDArray[np.int32] = self._cache["sides"][list(rows)]
        return sides_of_rows

    def _chosen(self, epoch: int, offset: int) -> NDArray[np.int64]:
        """Indices into `rows_I` of the rows of a step, which is counted from 0 within its epoch."""
        if self._cache.get("epoch") != epoch:  # cached: one epoch serves many steps
            order = shuffled(self.weights_I, self.sources_I, seed=self.seed, epoch=epoch)
            self._cache.update(epoch=epoch, order=order)
        order_R: NDArray[np.int64] = self._cache["order"]
        return order_R[offset * self.rows_per_step : (offset + 1) * self.rows_per_step]


def pass_cost(device: object) -> int:
    """Cost of a micro-batch besides its tokens, in tokens. `device`: a device, or its kind."""
    return MICRO_BATCH_COST if str(device).startswith("cpu") else COST_ON_CARD


def make_micro_batches(
    rows: Sequence[int],
    lengths: Sequence[int],
    *,
    tokens_per_pass: int,
    layout: Layout,
    targets: Sequence[int] = (),
    cost: int = MICRO_BATCH_COST,
) -> list[MicroBatch]:
    """Group rows into micro-batches of at most `tokens_per_pass` tokens, longest first; a longer row is alone.

    Every row is in exactly one micro-batch. Packed rows are placed by best-fit decreasing (Johnson et al. 1974,
    "Worst-case performance bounds for simple one-dimensional packing algorithms"). Padded rows are grouped by
    length, and padding counts, as does each micro-batch (`cost`, in tokens). `targets`: for an encoder–decoder
    the tokens of each row that its decoder reads, which are padded apart from the others.
    """
    if layout == "packed":
        by_length = sorted(range(len(rows)), key=lambda i: (-lengths[i], rows[i], i))
        batches = _fill_packed([lengths[i] for i in by_length], tokens_per_pass)
        return [tuple(rows[by_length[at]] for at in members) for members in batches]
    sides_RS = np.array([lengths], np.int64).T
    if targets:
        sides_RS = np.array([np.subtract(lengths, targets), targets], np.int64).T
    order_R = np.lexsort((rows, -sides_RS.sum(1)))
    cuts = _cut_padded(sides_RS[order_R], tokens_per_pass, cost)
    return [tuple(rows[i] for i in order_R[cut]) for cut in cuts]


def copies_in(batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    """Number the copies of each row in a step: 0, and 1, 2, ... where its weight is above 1."""
    seen: dict[int, int] = {}

    def number(row: int) -> int:
        seen[row] = seen.get(row, -1) + 1
        return seen[row]

    return [tuple(map(number, rows)) for rows in batches]


def make_sharing_micro_batches(rows: Sequence[int], keys: Sequence[Keys], *, tokens_per_pass: int) -> list[MicroBatch]:
    """Group packed rows into micro-batches of at most `tokens_per_pass` computed tokens, with shared prefixes
    computed once; a longer row goes alone. A function of the rows, whatever their order.

    `keys`: of each row, see `prefix_keys`. Rows with one prefix stay together as far as they fit; groups are
    packed as `make_micro_batches` packs rows.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(keys[i]), rows[i], i))
    lengths = [len(keys[i]) for i in order]
    units: list[tuple[int, list[int]]] = []
    """(tokens, indices into `order`)."""
    for group in prefix_groups([keys[i] for i in order]):
        computed, read, unit = group.stop, 0, list[int]()
        for member in group.members:
            with_member = computed + lengths[member] - group.stop, read + lengths[member]
            if unit and _counted_tokens(*with_member) > tokens_per_pass:
                units.append((_counted_tokens(computed, read), unit))
                unit, with_member = [], (lengths[member], lengths[member])
            unit.append(member)
            computed, read = with_member
        units.append((_counted_tokens(computed, read), unit))
    units.sort(key=lambda unit: (-unit[0], unit[1]))
    batches: list[MicroBatch] = []
    for members in _fill_packed([size for size, _ in units], tokens_per_pass):
        places = sorted(place for i in members for place in units[i][1])
        batches.append(tuple(rows[order[place]] for place in places))
    return batches


def _counted_tokens(computed: int, read: int) -> int:
    """The size of rows with shared prefixes for `tokens_per_pass`: what is computed, unless `MOST_READ` counts
    more. `read`: the tokens of the whole rows."""
    return max(computed, -(-read // MOST_READ))


def _fill_packed(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
    """Indices of `lengths`, which must be in falling order, micro-batch by micro-batch."""
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """(tokens left, micro-batch), by tokens left."""
    for i, length in enumerate(lengths):
        at = bisect_left(rooms, (length, 0))
        if at < len(rooms):
            left, place = rooms.pop(at)
            batches[place].append(i)
        else:
            left, place = tokens_per_pass, len(batches)
            batches.append([i])
        insort(rooms, (left - length, place))
    return batches


def _cut_padded(sides_RS: NDArray[np.int64], tokens_per_pass: int, cost: int) -> list[slice]:
    """Cut rows in falling order of length into the micro-batches of the lowest cost.

    All rows of a micro-batch cost as much as its longest. Dynamic programming from the last row on.
    """
    num = len(sides_RS)
    costs = np.zeros(num + 1)
    """Lowest cost of the rows from each index on."""
    ends = [num] * num
    for i in range(num - 1, -1, -1):
        most = max(1, tokens_per_pass // max(1, int(sides_RS[i].sum())))
        longest = np.maximum.accumulate(sides_RS[i : i + most], axis=0).sum(1)
        sizes = np.arange(1, len(longest) + 1)
        computed = sizes * longest
        fitting = max(1, int(np.searchsorted(computed, tokens_per_pass, side="right")))
        totals = cost + computed[:fitting] + costs[i + 1 : i + 1 + fitting]
        best = int(totals.argmin())
        costs[i], ends[i] = totals[best], i + 1 + best
    batches, start = [], 0
    while start < num:
        batches.append(slice(start, ends[start]))
        start = ends[start]
    return batches


def sort_keys(items: NDArray[np.int64], seed: int, epoch: int, *, salt: int, copy: int = 0) -> NDArray[np.uint64]:
    """One 64-bit sort key per item: splitmix64 of (seed, epoch, salt, copy, item), the same on every platform
    and numpy release.

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
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def copies(
    weights_I: NDArray[np.float64], sources_I: NDArray[np.int64] | None = None, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """Copies of each row in an epoch. A whole weight is the number of copies; of a fraction as many rows of
    that weight and source get one copy more."""
    whole_I = np.floor(weights_I).astype(np.int64)
    part_I = weights_I - whole_I
    sources_I = np.zeros(len(part_I), np.int64) if sources_I is None else sources_I
    for source in np.unique(sources_I):
        own_I = np.flatnonzero(sources_I == source)
        for weight in np.unique(part_I[own_I][part_I[own_I] > 0]):
            members = own_I[part_I[own_I] == weight]
            keys = sort_keys(members, seed, epoch, salt=1)
            extra = members[np.argsort(keys, kind="stable")[: max(1, round(float(weight) * len(members)))]]
            whole_I[extra] += 1
    return whole_I


def shuffled(
    weights_I: NDArray[np.float64], sources_I: NDArray[np.int64] | None = None, *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """[R], the rows of an epoch in random order."""
    rows_R = np.repeat(np.arange(len(weights_I)), copies(weights_I, sources_I, seed=seed, epoch=epoch))
    return rows_R[np.argsort(sort_keys(np.arange(len(rows_R)), seed, epoch, salt=0), kind="stable")]


def micro_batches_of(
    store: RowStore, rows: Sequence[int], *, tokens_per_pass: int, layout: Layout, device: object
) -> list[MicroBatch]:
    """Group rows of a store into micro-batches for measuring on a device; their order does not matter."""
    rows_I = np.asarray(rows, np.int64)
    targets = store.targets[rows_I].tolist() if layout == "encoder_decoder" else ()
    lengths = store.lengths_in(layout)[rows_I].tolist()
    settings: dict[str, Any] = {"layout": layout, "targets": targets, "cost": pass_cost(device)}
    return make_micro_batches(rows, lengths, tokens_per_pass=tokens_per_pass, **settings)


def padded_size(num_tokens: int) -> int:
    """Tokens of a packed micro-batch after padding to a multiple."""
    return -(-num_tokens // MULTIPLE) * MULTIPLE
