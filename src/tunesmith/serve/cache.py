"""Keys and values of the texts under way, and the attention that reads them.

A prompt is read into a block of its own; the texts that are written lie side by side in pools, each with room for a
power of two of tokens, so that one call of the kernel attends for all rows of a pool and at most half of it is waste.
A row that is full moves to the next pool; a row that ends is filled with the last one, so that rows stay dense.
"""

# N rows of a pool, H heads, G groups of heads that share keys, R heads of a group, T tokens of a pass, L room, D head
# size, Q queries, K keys

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tunesmith.models import attention
from tunesmith.models.attention import AttentionOptions, Segments, UnsupportedAttentionError, explicit_attention

NAME = "tunesmith_cached"
SMALLEST = 128
"""Tokens of room in the smallest pool."""


def use_cached(model: PreTrainedModel) -> None:
    """Let the model read the keys and values of a `Pass`; other calls go on as before."""
    attention.register()
    AttentionInterface.register(NAME, cached_attention)
    AttentionMaskInterface.register(NAME, attention.packed_mask)
    model.set_attn_implementation(NAME)


def room_for(num_tokens: int) -> int:
    """The room of the pool for a text of so many tokens."""
    return max(SMALLEST, 1 << (num_tokens - 1).bit_length())


class Block:
    """Keys and values of `rows` texts, by layer: [N, G, L, D] each, made when a layer first writes."""

    def __init__(self, rows: int, room: int) -> None:
        self.rows = rows
        self.room = room
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer whose new ones these are."""
        if layer not in self.layers:
            self.layers[layer] = (self._empty(key_1GTD), self._empty(value_1GTD))
        return self.layers[layer]

    def _empty(self, like_1GTD: Tensor) -> Tensor:
        # Zeros, since what is masked away is multiplied by zero, and garbage can be NaN.
        _, num_groups, _, size = like_1GTD.shape
        return like_1GTD.new_zeros(self.rows, num_groups, self.room, size)

    def bytes_per_token(self) -> int:
        """Of one text, in all layers that have written."""
        return sum(
            tensor.shape[1] * tensor.shape[3] * tensor.element_size()
            for pair in self.layers.values()
            for tensor in pair
        )

    def copy_row(self, row: int, source: Block, source_row: int, num_tokens: int) -> None:
        """Put the first tokens of a row of another block, or of this one, into a row of this, and zeros behind them."""
        for layer, (key_NGLD, value_NGLD) in source.layers.items():
            own = self.of(layer, key_NGLD[:1], value_NGLD[:1])
            for to_NGLD, from_NGLD in zip(own, (key_NGLD, value_NGLD), strict=True):
                to_NGLD[row, :, :num_tokens] = from_NGLD[source_row, :, :num_tokens]
                # What an earlier text left is masked away, but 0 times NaN is NaN.
                to_NGLD[row, :, num_tokens:] = 0


@dataclass(eq=False)
class Lane:
    """One text: what has been read of it, and where that lies."""

    adapter: str | None
    block: Block
    """While it is filled a block of its own, then that of its pool."""
    length: int = 0
    row: int = 0
    pool: Pool | None = None


class Pool:
    """Texts with `room` tokens each, in rows 0 to N - 1."""

    def __init__(self, room: int) -> None:
        self.block = Block(1, room)
        self.lanes: list[Lane] = []

    def add(self, lane: Lane) -> None:
        """Copy what a lane has read into a row of this pool."""
        num = len(self.lanes)
        if num == self.block.rows:
            larger = Block(2 * num, self.block.room)
            for row, other in enumerate(self.lanes):
                larger.copy_row(row, self.block, row, other.length)
                other.block = larger
            self.block = larger
        self.block.copy_row(num, lane.block, lane.row, lane.length)
        lane.block, lane.row, lane.pool = self.block, num, self
        self.lanes.append(lane)

    def free(self, row: int) -> None:
        """Give a row back; the last one takes its place."""
        last = self.lanes.pop()
        if row != len(self.lanes):
            self.block.copy_row(row, self.block, last.row, last.length)
            self.lanes[row] = last
            last.row = row


class Cache:
    """The pools in use, by their room."""

    def __init__(self) -> None:
        self.pools: dict[int, Pool] = {}

    def join(self, lane: Lane) -> None:
        """Give a lane a row with room for one token more."""
        room = room_for(lane.length + 1)
        self.pools.setdefault(room, Pool(room)).add(lane)

    def leave(self, lane: Lane) -> None:
        """Give back what a lane holds."""
        if lane.pool is not None:
            self._free(lane.pool, lane.row)

    def make_room(self) -> None:
        """Move every text that fills its room to the next pool."""
        for lane in self.lanes():
            pool, row = lane.pool, lane.row
            if pool is not None and lane.length == pool.block.room:
                self.join(lane)
                self._free(pool, row)

    def _free(self, pool: Pool, row: int) -> None:
        pool.free(row)
        if not pool.lanes:
            del self.pools[pool.block.room]

    def lanes(self) -> list[Lane]:
        """Every text that is being written, in the order of the pools and their rows."""
        return [lane for pool in self.pools.values() for lane in pool.lanes]


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a pool in a pass: one a row, from token `first` of the pass on."""

    pool: Pool
    first: int
    positions_N: Tensor
    index_N: Tensor
    longest: int
    """Tokens of the longest row, the new one with them."""
    masks: dict[tuple[int | None, torch.dtype], Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, pool: Pool, first: int, device: torch.device) -> Rows:
        lengths = [lane.length for lane in pool.lanes]
        positions_N = torch.tensor(lengths, device=device)
        return cls(pool, first, positions_N, torch.arange(len(lengths), device=device), max(lengths) + 1)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[N, 1, 1, L], bool or what is added to scores; None where every row reads everything."""
        key = (window, dtype)
        if key not in self.masks:
            places_1L = torch.arange(self.longest, device=self.positions_N.device)[None]
            last_N1 = self.positions_N[:, None]
            seen_NL = places_1L <= last_N1
            if window is not None:
                seen_NL &= places_1L > last_N1 - window
            mask = None if bool(seen_NL.all()) else seen_NL[:, None, None]
            if mask is not None and dtype != torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
            self.masks[key] = mask
        return self.masks[key]


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one prompt in a pass, from token `first` on; `lane.length` stand before them."""

    lane: Lane
    first: int
    num: int


@dataclass(frozen=True, slots=True)
class Pass:
    """Where the tokens of a forward pass belong: rows of pools, and behind them parts of prompts."""

    rows: Sequence[Rows]
    spans: Sequence[Span]
    segments: Segments
    """Which keeps the masks of prompts that are read in parts."""


_New = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of all tokens of a pass."""


def cached_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    *,
    lanes: Pass | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, D]: every token reads what stands before it in its own text, and is kept there for those to come.

    Without `lanes` it is `attention.packed_attention`. Raises UnsupportedAttentionError for attention sinks and
    position biases, and for layers that do not say which they are.
    """
    if lanes is None:
        others |= {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return attention.packed_attention(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **others)
    layer = getattr(module, "layer_idx", None)
    if layer is None or others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise UnsupportedAttentionError("its attention has sinks, position biases, or layers without a number")
    attention.trace_call(sliding_window)
    told = AttentionOptions(True, 0.0, scaling, sliding_window, softcap)
    new = (query_1HTD, key_1GTD, value_1GTD)
    parts = [_rows(rows, layer, new, told) for rows in lanes.rows]
    parts += [_span(span, layer, new, told, lanes.segments) for span in lanes.spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _rows(rows: Rows, layer: int, new: _New, how: AttentionOptions) -> Tensor:
    """[N, H, D]"""
    query_1HTD, key_1GTD, value_1GTD = new
    num = len(rows.pool.lanes)
    place = slice(rows.first, rows.first + num)
    key_NGLD, value_NGLD = rows.pool.block.of(layer, key_1GTD, value_1GTD)
    key_NGLD[rows.index_N, :, rows.positions_N] = key_1GTD[0, :, place].transpose(0, 1)
    value_NGLD[rows.index_N, :, rows.positions_N] = value_1GTD[0, :, place].transpose(0, 1)
    k_NGLD, v_NGLD = key_NGLD[:num, :, : rows.longest], value_NGLD[:num, :, : rows.longest]
    q_NHD = query_1HTD[0, :, place].transpose(0, 1)
    if how.softcap is not None:
        mask = rows.mask(how.window, torch.bool)
        return explicit_attention(q_NHD[:, :, None], k_NGLD, v_NGLD, mask, how)[:, :, 0]
    # Heads that share keys are queries of one row: none of the keys is copied for them.
    q_NGRD = torch.unflatten(q_NHD, 1, (k_NGLD.shape[1], -1))
    mask = rows.mask(how.window, q_NGRD.dtype)
    out_NGRD = F.scaled_dot_product_attention(q_NGRD, k_NGLD, v_NGLD, attn_mask=mask, scale=how.scaling)
    return out_NGRD.flatten(1, 2)


def _span(span: Span, layer: int, new: _New, how: AttentionOptions, segments: Segments) -> Tensor:
    """[T of the span, H, D]"""
    query_1HTD, key_1GTD, value_1GTD = new
    place, stop = slice(span.first, span.first + span.num), span.lane.length + span.num
    key_1GLD, value_1GLD = span.lane.block.of(layer, key_1GTD, value_1GTD)
    key_1GLD[:, :, span.lane.length : stop] = key_1GTD[:, :, place]
    value_1GLD[:, :, span.lane.length : stop] = value_1GTD[:, :, place]
    # A window ends before the first key of a span by as much as the span is long.
    first = 0 if how.window is None else max(0, span.lane.length - how.window + 1)
    q_1HQD = query_1HTD[:, :, place]
    k_1GKD, v_1GKD = key_1GLD[:, :, first:stop], value_1GLD[:, :, first:stop]
    num_keys = stop - first
    window = num_keys if how.window is None else min(how.window, num_keys)
    causal = span.num == num_keys == window
    if how.softcap is not None:
        band = segments.band(span.num, num_keys, window)
        return explicit_attention(q_1HQD, k_1GKD, v_1GKD, band, how)[0].transpose(0, 1)
    out_1HQD = F.scaled_dot_product_attention(
        q_1HQD,
        k_1GKD,
        v_1GKD,
        attn_mask=None if causal else segments.band(span.num, num_keys, window),
        is_causal=causal,
        scale=how.scaling,
        enable_gqa=q_1HQD.shape[1] != k_1GKD.shape[1],
    )
    return out_1HQD[0].transpose(0, 1)
