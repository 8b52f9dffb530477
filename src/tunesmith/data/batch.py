"""The steps of a run, and the tensors of one pass.

Which rows make which step is a pure function of (lengths, seed, epoch), so any step can be named, repeated and resumed
to without replaying those before it.
"""

# B rows, T tokens, N targets, U tokens of the decoder, S sides of a row

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.order import POOL_STEPS, copies, grouped, pool_of, shuffled
from tunesmith.data.passes import Pass, fill_passes, fill_sharing, places
from tunesmith.data.sharing import num_computed
from tunesmith.types import Batch, Layout, Row

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
    targets_I: NDArray[np.int32] | None = None
    """Of an encoder–decoder how many of a row's tokens its decoder reads, which stand apart from the others."""
    groups_by_length: bool = False
    """Whether rows of like length make a step: see `order.grouped`. False: a step is a random sample."""
    ids_of: Callable[[int], NDArray[np.int32]] | None = field(default=None, compare=False)
    """The tokens of a row of the store, where what rows of a pass begin with alike is computed once: passes are then
    filled by what is computed. None: rows are computed whole."""
    _kept: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def rows_per_epoch(self) -> int:
        if "rows_per_epoch" not in self._kept:  # asked for at each step
            self._kept["rows_per_epoch"] = int(copies(self.weights_I, seed=self.seed, epoch=0).sum())
        return int(self._kept["rows_per_epoch"])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows_per_epoch // self.rows_per_step)

    def step(self, step: int) -> list[Pass]:
        """The passes of the 1-based optimizer step, as rows of the store."""
        epoch, offset = divmod(step - 1, self.steps_per_epoch)
        rows: list[int] = self.rows_I[self._chosen(epoch, offset)].tolist()
        if self.ids_of is not None:
            return fill_sharing(rows, [self.ids_of(row) for row in rows], tokens_per_pass=self.tokens_per_pass)
        return fill_passes(
            rows,
            self.lengths_of(rows),
            tokens_per_pass=self.tokens_per_pass,
            layout=self.layout,
            targets=() if self.targets_I is None else self._sides_of(rows)[:, 1].tolist(),
        )

    def computed(self, rows: Pass) -> int:
        """Places that a pass over these rows computes, padding among them."""
        if self.ids_of is not None:
            return num_computed([self.ids_of(row) for row in rows])
        return sum(self.lengths_of(rows)) if self.layout == "packed" else places(self._sides_of(rows))

    def padding(self, most_steps: int = POOL_STEPS) -> float:
        """Share of the places computed in the first steps of a run that hold no token."""
        if self.layout == "packed":
            return 0.0
        passes = [rows for step in range(min(most_steps, self.steps_per_epoch)) for rows in self.step(step + 1)]
        tokens = sum(sum(self.lengths_of(rows)) for rows in passes)
        return 1.0 - tokens / sum(map(self.computed, passes))

    def lengths_of(self, rows: Sequence[int]) -> list[int]:
        """The tokens of rows of the store that are trained on."""
        lengths: list[int] = self._sides_of(rows).sum(1).tolist()
        return lengths

    def _sides_of(self, rows: Sequence[int]) -> NDArray[np.int32]:
        """Tokens of rows of the store, [B, S]: those of source and target where these stand apart."""
        if "sides" not in self._kept:
            self._kept["sides"] = np.zeros((int(self.rows_I.max()) + 1, self._sides.shape[1]), np.int32)
            self._kept["sides"][self.rows_I] = self._sides
        found: NDArray[np.int32] = self._kept["sides"][list(rows)]
        return found

    @property
    def _sides(self) -> NDArray[np.int32]:
        """The same of the rows that are trained on, in their order."""
        if self.targets_I is None:
            return self.lengths_I[:, None]
        return np.stack([self.lengths_I - self.targets_I, self.targets_I], axis=1)

    def _chosen(self, epoch: int, offset: int) -> NDArray[np.int64]:
        """The rows of a step of an epoch, counted from 0, as places in `rows_I`."""
        if self._kept.get("epoch") != epoch:  # one epoch serves many steps in a row: the last is kept
            self._kept.update(epoch=epoch, pool=range(0))
            self._kept["order"] = shuffled(self.weights_I, seed=self.seed, epoch=epoch)
        order, size = self._kept["order"], self.rows_per_step
        if not self.groups_by_length:
            found: NDArray[np.int64] = order[offset * size : (offset + 1) * size]
            return found
        if offset not in self._kept["pool"]:
            pool = pool_of(offset, self.steps_per_epoch)
            rows_R = order[pool.start * size : pool.stop * size]
            sides_RS = self._sides_of(self.rows_I[rows_R])
            steps = grouped(sides_RS, pool, rows_per_step=size, seed=self.seed, epoch=epoch)
            self._kept.update(pool=pool, steps=[rows_R[at] for at in steps])
        found = self._kept["steps"][offset - self._kept["pool"].start]
        return found


def build_batch(
    rows: Sequence[Row],
    row_indices: Sequence[int],
    *,
    layout: Layout,
    device: torch.device | str,
    decoder_start: int | None = None,
    has_types: bool = False,
    pad_id: int = 0,
) -> Batch:
    """The tensors of one pass. The one place where targets are shifted: position t predicts token t + 1 of its row.

    Rows with labels are not shifted: what they hold is learnt where it stands. An encoder–decoder reads the source,
    and its decoder `decoder_start` and the target but for its last token. `has_types`: the model tells the two texts
    of a pair apart by token types. `pad_id`: the token that shorter rows are padded with.
    """
    is_pair, is_packed = layout == "encoder_decoder", layout == "packed"
    read = [_source(row) if is_pair else row.ids for row in rows]
    lengths = [len(ids) for ids in read]
    longest = max(lengths)
    starts, ids_BT = _laid_out(read, is_packed=is_packed, pad_id=pad_id)
    if is_packed:
        positions_BT = np.concatenate([np.arange(n) for n in lengths])[None]
        mask_BT = None
    else:
        positions_BT = np.broadcast_to(np.arange(longest), ids_BT.shape)
        # Padding is known by length, never by id: the padded id is a real token that no target or mask refers to.
        mask_BT = (np.arange(longest)[None] < np.array(lengths)[:, None]).astype(np.int64)
    decoder_ids_BU, targets = None, list[NDArray[np.int32]]()
    learnt = [_learnt(row, int(start)) for row, start in zip(rows, starts, strict=True)]
    if is_pair:
        assert decoder_start is not None, "the model does not say which token its decoder starts from"
        targets = [row.ids[n:] for row, n in zip(rows, lengths, strict=True)]
        decoder_ids_BU, learnt = _decoder(targets, decoder_start, pad_id=pad_id)
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
        targets_B=tuple(map(len, targets)),
    )


def _learnt(row: Row, start: int) -> Learnt:
    """Labels are predicted where they stand, tokens by the one before."""
    if row.labels is not None:
        return start + np.flatnonzero(row.trained), row.labels
    return start + np.flatnonzero(row.trained[1:]), row.ids[1:][row.trained[1:]]


def _source(row: Row) -> NDArray[np.int32]:
    return row.ids[: int(np.argmax(row.trained))]


def _decoder(
    targets: Sequence[NDArray[np.int32]], start_id: int, *, pad_id: int
) -> tuple[NDArray[np.generic], list[Learnt]]:
    """What a decoder reads, [B, U], and what it learns: each token of the target from those before it."""
    read = [np.concatenate([[start_id], ids[:-1]]) for ids in targets]
    starts, ids_BU = _laid_out(read, is_packed=False, pad_id=pad_id)
    learnt: list[Learnt] = [(start + np.arange(len(ids)), ids) for start, ids in zip(starts, targets, strict=True)]
    return ids_BU, learnt


def _types(rows: Sequence[Row], starts: NDArray[np.int64], ids_BT: NDArray[np.generic]) -> NDArray[np.int64]:
    flat = np.zeros(ids_BT.size, np.int64)
    for row, start in zip(rows, starts, strict=True):
        if row.second:
            flat[start + row.second : start + len(row.ids)] = 1
    return flat.reshape(ids_BT.shape)


def _laid_out(
    lines: Sequence[NDArray[np.generic]], *, is_packed: bool, pad_id: int
) -> tuple[NDArray[np.signedinteger[Any]], NDArray[np.generic]]:
    """Where each line begins once they are flat, and they themselves: end to end, or one below the other."""
    lengths = [len(line) for line in lines]
    if is_packed:
        return np.cumsum([0, *lengths[:-1]]), np.concatenate(lines)[None]
    padded = np.full((len(lines), max(lengths)), pad_id, np.int64)
    for b, line in enumerate(lines):
        padded[b, : len(line)] = line
    return np.arange(len(lines)) * max(lengths), padded
