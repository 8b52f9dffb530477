"""Rows of a store as batches of a model: masked where the model learns masked tokens."""

# T tokens, N targets

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tunesmith.data.batch import build_batch
from tunesmith.data.dataset import RowStore
from tunesmith.data.filling import fill
from tunesmith.data.order import sort_keys
from tunesmith.data.passes import Pass, fill_passes
from tunesmith.data.sharing import share
from tunesmith.types import Batch, Layout, Row

RANDOM_BEYOND = 0.8
KEPT_BEYOND = 0.9


@dataclass(frozen=True, slots=True)
class Masking:
    """Which tokens of a row are learnt, and what stands in their place.

    80 % show the mask, 10 % a random token, 10 % themselves. Source: Devlin et al. 2018, "BERT", section 3.1.
    """

    mask_id: int
    ordinary_ids: NDArray[np.int64]
    """Tokens that can take the place of another."""
    share: float
    """Of a row's trained tokens, at least one is learnt."""
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, *, share: float, seed: int) -> Masking:
        """Masking by the mask of a tokenizer that has one."""
        ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.added_tokens_decoder))
        return cls(int(tokenizer.mask_token_id), np.array(ordinary, np.int64), share, seed)

    def apply(self, row: Row, *, num: int, draw: int, index: int, copy: int = 0) -> Row:
        """`row` with `num` of its trained tokens to be learnt: a pure function of (seed, draw, index, copy).

        `index` is any whole number that names the row, `copy` numbers its copies in one draw.
        """
        places = np.flatnonzero(row.trained)

        def keys(purpose: int) -> NDArray[np.uint64]:
            return sort_keys(places, self.seed, draw, salt=4 * index + purpose, copy=copy)

        order = np.argsort(keys(1), kind="stable")[:num]
        order.sort()
        chosen_N = places[order]
        shares_N = (keys(2) / 2.0**64)[order]
        random_N = self.ordinary_ids[(keys(3) % np.uint64(len(self.ordinary_ids))).astype(np.int64)[order]]
        ids_T = row.ids.astype(np.int64)
        originals_N = ids_T[chosen_N]
        shown_N = np.where(shares_N < RANDOM_BEYOND, self.mask_id, random_N)
        ids_T[chosen_N] = np.where(shares_N < KEPT_BEYOND, shown_N, originals_N)
        trained_T = np.zeros(len(ids_T), np.bool_)
        trained_T[chosen_N] = True
        return replace(row, ids=ids_T.astype(np.int32), trained=trained_T, labels=originals_N)


@dataclass(frozen=True, slots=True)
class Feed:
    """The rows of a store as a model takes them."""

    store: RowStore
    layout: Layout
    device: torch.device | str
    masking: Masking | None = None
    """None: the model does not learn masked tokens."""
    decoder_start: int | None = None
    has_types: bool = False
    shares: bool = False
    """Whether what rows of a pass begin with alike is computed once."""
    fills: bool = False
    """Whether passes are filled up to whole sizes."""
    pad_id: int = 0
    """See `models.padding.pad_id`."""

    def __post_init__(self) -> None:
        if self.masking is not None:
            self.store.use_masks(self.masking.share)

    def batch(self, members: Sequence[int], *, draw: int, copies: Sequence[int] = ()) -> Batch:
        """One pass over rows of the store. `draw` numbers the maskings of a row: the step, or 0 to measure. `copies`:
        see `passes.copies_in`; empty: each row is there once.

        In a step, masks follow from a row's place in the store; to measure, from what its example says, so that they
        are the same in another file, order or run.
        """
        copies = tuple(copies) or (0,) * len(members)
        rows = [self._row(index, draw, copy) for index, copy in zip(members, copies, strict=True)]
        batch = build_batch(
            rows,
            members,
            layout=self.layout,
            device=self.device,
            decoder_start=self.decoder_start,
            has_types=self.has_types,
            pad_id=self.pad_id,
        )
        batch = replace(batch, copies_B=copies)
        batch = share(batch, [row.ids for row in rows]) if self.shares else batch
        return fill(batch) if self.fills else batch

    def _row(self, index: int, draw: int, copy: int) -> Row:
        row = self.store.row(index)
        if self.masking is None:
            return row
        name = index if draw else self._content(index)
        return self.masking.apply(row, num=int(self.store.denominators[index]), draw=draw, index=name, copy=copy)

    def _content(self, index: int) -> int:
        """A number for what a row says: its example's content hash, and which window of it the row is."""
        return int(self.store.hashes[index]) + int(self.store.windows[index])


def passes_of(store: RowStore, rows: Sequence[int], *, tokens_per_pass: int, layout: Layout) -> list[Pass]:
    """Rows of a store grouped into passes, where nobody asks in which order: to measure."""
    rows_I = np.asarray(rows, np.int64)
    targets = store.targets[rows_I].tolist() if layout == "encoder_decoder" else ()
    lengths = store.lengths[rows_I].tolist()
    return fill_passes(rows, lengths, tokens_per_pass=tokens_per_pass, layout=layout, targets=targets)
