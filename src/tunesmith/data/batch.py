"""Which rows make which step, and the tensors of one pass.

Everything about order is a pure function of (lengths, seed, epoch), so any step can be named, repeated and resumed to
without replaying those before it.
"""

# B rows, T tokens, N targets, U tokens of the decoder

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.sharing import families, num_computed
from tunesmith.types import Batch, Layout, Row

Pass = tuple[int, ...]
"""Row indices that go through the model together."""
PASS_PLACES = 64
"""What a pass costs beside its tokens, in tokens: a small model on a processor computes so many in that time."""
MOST_READ = 4
"""Times its tokens that the rows of a pass may have where they share: each keeps the keys of what it begins with."""
Learnt = tuple[NDArray[np.int64], NDArray[np.generic]]
"""Flat positions that predict, and what."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps of a run.

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
    ids_of: Callable[[int], NDArray[np.int32]] | None = field(default=None, compare=False)
    """The tokens of a row of the store, where what rows of a pass begin with alike is computed once: passes are then
    filled by what is computed. None: rows are computed whole."""
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rows_per_epoch(self) -> int:
        if "rows_per_epoch" not in self._kept:  # asked for at each step
            self._kept["rows_per_epoch"] = int(self._copies(0).sum())
        return int(self._kept["rows_per_epoch"])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.rows_per_step)

    def step(self, step: int) -> list[Pass]:
        """The passes of the 1-based optimizer step, as rows of the store."""
        epoch, offset = divmod(step - 1, self.steps_per_epoch)
        order = self._order(epoch)
        chosen = order[offset * self.rows_per_step : (offset + 1) * self.rows_per_step]
        rows = [int(self.rows_I[i]) for i in chosen]
        if self.ids_of is not None:
            return fill_sharing(rows, [self.ids_of(row) for row in rows], tokens_per_pass=self.tokens_per_pass)
        lengths = [int(self.lengths_I[i]) for i in chosen]
        return fill_passes(rows, lengths, tokens_per_pass=self.tokens_per_pass, layout=self.layout)

    def computed(self, rows: Pass, lengths: Sequence[int]) -> int:
        """Places that a pass over these rows computes, padding among them; of an encoder–decoder about."""
        if self.ids_of is not None:
            return num_computed([self.ids_of(row) for row in rows])
        return sum(lengths) if self.layout == "ragged" else max(lengths) * len(lengths)

    def padding(self, most_steps: int = 64) -> float:
        """Share of the places computed in the first steps of a run that hold no token; of an encoder–decoder about."""
        if self.layout == "ragged":
            return 0.0
        passes = [rows for step in range(min(most_steps, self.steps_per_epoch)) for rows in self.step(step + 1)]
        places = sum(self.computed(rows, self.lengths_of(rows)) for rows in passes)
        return 1.0 - float(sum(sum(self.lengths_of(rows)) for rows in passes) / places)

    def lengths_of(self, rows: Pass) -> list[int]:
        """The tokens of rows of the store that are trained on."""
        if "lengths" not in self._kept:
            self._kept["lengths"] = np.zeros(int(self.rows_I.max()) + 1, np.int32)
            self._kept["lengths"][self.rows_I] = self.lengths_I
        found: list[int] = self._kept["lengths"][list(rows)].tolist()
        return found

    def _copies(self, epoch: int) -> NDArray[np.int64]:
        """How often each row stands in an epoch: w times, and for a fraction w, a part of the rows of that weight."""
        whole = np.floor(self.weights_I).astype(np.int64)
        part = self.weights_I - whole
        for weight in np.unique(part[part > 0]):
            members = np.flatnonzero(part == weight)
            keys = sort_keys(members, self.seed, epoch, salt=1)
            extra = members[np.argsort(keys, kind="stable")[: max(1, round(float(weight) * len(members)))]]
            whole[extra] += 1
        return whole

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._kept.get("epoch") != epoch:  # one epoch serves many steps in a row: the last is kept
            copies = np.repeat(np.arange(len(self.rows_I)), self._copies(epoch))
            keys = sort_keys(np.arange(len(copies)), self.seed, epoch, salt=0)
            self._kept.update(epoch=epoch, order=copies[np.argsort(keys, kind="stable")])
        order: NDArray[np.int64] = self._kept["order"]
        return order


def sort_keys(items: NDArray[np.int64], seed: int, epoch: int, *, salt: int) -> NDArray[np.uint64]:
    """One 64-bit sort key an item: splitmix64 of (seed, epoch, item), the same on every platform and numpy release.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    start = np.uint64((seed * 0x9E3779B97F4A7C15 + epoch * 0xD1B54A32D192ED03 + salt * 0x8CB92BA72F3D8DD7) % 2**64)
    with np.errstate(over="ignore"):
        z = items.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
        for _ in range(2):  # twice: neighbouring seeds start from neighbouring states
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return z


def fill_passes(rows: Sequence[int], lengths: Sequence[int], *, tokens_per_pass: int, layout: Layout) -> list[Pass]:
    """Rows grouped into passes of at most `tokens_per_pass` tokens, longest first; a longer row goes alone.

    Every row is in exactly one pass. Ragged, a row joins the pass that it fills best (best-fit decreasing: Johnson et
    al. 1974, "Worst-case performance bounds for simple one-dimensional packing algorithms"). Padded, rows of like
    length stand together, and passes count the padding, of an encoder–decoder as if both sides were one line.
    """
    by_length = sorted(range(len(rows)), key=lambda i: (-lengths[i], rows[i], i))
    ordered = [lengths[i] for i in by_length]
    fill = _fill_ragged if layout == "ragged" else _fill_padded
    return [tuple(rows[by_length[at]] for at in members) for members in fill(ordered, tokens_per_pass)]


def fill_sharing(rows: Sequence[int], ids: Sequence[NDArray[np.int32]], *, tokens_per_pass: int) -> list[Pass]:
    """Rows grouped into ragged passes that compute at most `tokens_per_pass` tokens where what rows of a pass begin
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
    passes = _fill_ragged([size for size, _ in units], tokens_per_pass)
    return [tuple(rows[order[at]] for at in sorted(at for i in members for at in units[i][1])) for members in passes]


def _size(computed: int, read: int) -> int:
    return max(computed, -(-read // MOST_READ))


def _fill_ragged(lengths: Sequence[int], tokens_per_pass: int) -> list[list[int]]:
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


def _fill_padded(lengths: Sequence[int], tokens_per_pass: int) -> list[range]:
    """Places of `lengths`, which fall, cut into the passes that compute the fewest places, those of a pass included.

    All rows of a pass cost as much as its first and longest. By dynamic programming from the shortest row on.
    """
    num = len(lengths)
    costs = np.zeros(num + 1)
    """Least places of the rows from each on."""
    ends = [num] * num
    for i in range(num - 1, -1, -1):
        most = max(1, tokens_per_pass // max(1, lengths[i]))
        sizes = np.arange(1, min(most, num - i) + 1)
        found = PASS_PLACES + lengths[i] * sizes + costs[i + 1 : i + 1 + len(sizes)]
        best = int(found.argmin())
        costs[i], ends[i] = found[best], i + 1 + best
    passes, start = [], 0
    while start < num:
        passes.append(range(start, ends[start]))
        start = ends[start]
    return passes


def build_batch(
    rows: Sequence[Row],
    row_indices: Sequence[int],
    *,
    layout: Layout,
    device: torch.device | str,
    decoder_start: int | None = None,
    has_types: bool = False,
) -> Batch:
    """The tensors of one pass. The one place where targets are shifted: position t predicts token t + 1 of its row.

    Rows with labels are not shifted: what they hold is learnt where it stands. An encoder–decoder reads the source,
    and its decoder `decoder_start` and the target but for its last token. `has_types`: the model tells the two texts
    of a pair apart by token types.
    """
    is_pair = layout == "encoder_decoder"
    read = [_source(row) if is_pair else row.ids for row in rows]
    lengths = [len(ids) for ids in read]
    longest = max(lengths)
    if layout == "ragged":
        starts = np.cumsum([0, *lengths[:-1]])
        ids_BT: NDArray[np.generic] = np.concatenate(read)[None]
        positions_BT = np.concatenate([np.arange(n) for n in lengths])[None]
        mask_BT = None
    else:
        starts = np.arange(len(rows)) * longest
        ids_BT = _padded(read, longest)
        positions_BT = np.broadcast_to(np.arange(longest), ids_BT.shape)
        # Padding is known by length, never by id: the padded id is a real token that no target or mask refers to.
        mask_BT = (np.arange(longest)[None] < np.array(lengths)[:, None]).astype(np.int64)
    decoder_ids_BU, learnt = None, [_learnt(row, int(start)) for row, start in zip(rows, starts, strict=True)]
    if is_pair:
        assert decoder_start is not None, "the model does not say which token its decoder starts from"
        decoder_ids_BU, learnt = _decoder([row.ids[n:] for row, n in zip(rows, lengths, strict=True)], decoder_start)
    counts = [len(places) for places, _ in learnt]

    def tensor(array: NDArray[np.generic]) -> torch.Tensor:
        whole = array if np.issubdtype(array.dtype, np.floating) else array.astype(np.int64)
        return torch.from_numpy(np.array(whole)).to(device, non_blocking=True)

    return Batch(
        layout=layout,
        ids_BT=tensor(ids_BT),
        positions_BT=tensor(positions_BT),
        mask_BT=None if mask_BT is None else tensor(mask_BT),
        lengths=tuple(len(row.ids) for row in rows),
        predict_N=tensor(np.concatenate([places for places, _ in learnt])),
        targets_N=tensor(np.concatenate([targets for _, targets in learnt])),
        row_of_N=tensor(np.repeat(np.arange(len(rows)), counts)),
        row_indices=tuple(row_indices),
        types_BT=tensor(_types(rows, starts, ids_BT)) if has_types else None,
        decoder_ids_BU=None if decoder_ids_BU is None else tensor(decoder_ids_BU),
    )


def _learnt(row: Row, start: int) -> Learnt:
    """Labels are predicted where they stand, tokens by the one before."""
    if row.labels is not None:
        return start + np.flatnonzero(row.trained), row.labels
    return start + np.flatnonzero(row.trained[1:]), row.ids[1:][row.trained[1:]]


def _source(row: Row) -> NDArray[np.int32]:
    return row.ids[: int(np.argmax(row.trained))]


def _decoder(targets: Sequence[NDArray[np.int32]], start_id: int) -> tuple[NDArray[np.int64], list[Learnt]]:
    """What a decoder reads, [B, U], and what it learns: each token of the target from those before it."""
    longest = max(map(len, targets))
    shifted = [np.concatenate([[start_id], target[:-1]]) for target in targets]
    learnt: list[Learnt] = [(b * longest + np.arange(len(target)), target) for b, target in enumerate(targets)]
    return _padded(shifted, longest), learnt


def _types(rows: Sequence[Row], starts: NDArray[np.int64], ids_BT: NDArray[np.generic]) -> NDArray[np.int64]:
    flat = np.zeros(ids_BT.size, np.int64)
    for row, start in zip(rows, starts, strict=True):
        if row.second:
            flat[start + row.second : start + len(row.ids)] = 1
    return flat.reshape(ids_BT.shape)


def _padded(lines: Sequence[NDArray[np.generic]], longest: int) -> NDArray[np.int64]:
    padded = np.zeros((len(lines), longest), np.int64)
    for b, line in enumerate(lines):
        padded[b, : len(line)] = line
    return padded
