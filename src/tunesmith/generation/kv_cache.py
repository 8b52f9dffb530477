"""Keys and values of the sequences in a batch, and the attention that reads them.

A prompt is read into a block of its own. Sequences that are decoded have rows in pools of 128, 256, 512, ...
tokens, so that one call of the kernel attends for all rows of a pool and at most half of it is waste. A full
row moves to the next pool; a row that ends is filled with the last one, so that rows stay dense.
"""

# N rows of a pool, H heads, G groups of heads that share keys, R heads of a group, T tokens of a pass, L room, D head
# size, Q queries, K keys

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tunesmith.models import attention
from tunesmith.models.segments import AttentionOptions, Segments, UnsupportedAttentionError, explicit_attention

Layers = dict[int, tuple[Tensor, Tensor]]
"""Keys and values of one sequence by layer, [G, T, D] each."""
CACHED = "tunesmith_cached"
SMALLEST = 128
"""Tokens of room in the smallest pool."""


def use_cached_attention(model: PreTrainedModel) -> None:
    """Let the model read a `BatchLayout`; calls without one work as before."""
    attention.register()
    AttentionInterface.register(CACHED, cached_attention)
    AttentionMaskInterface.register(CACHED, attention.packed_mask)
    model.set_attn_implementation(CACHED)


def room_for(num_tokens: int) -> int:
    """The room of the pool for a sequence of this length."""
    return max(SMALLEST, 1 << (num_tokens - 1).bit_length())


@dataclass(eq=False)
class SequenceSlot:
    """One sequence: the number of its tokens that were read, and the pool that holds their keys and values."""

    adapter: str | None
    pool: KVPool
    """Its own while the prompt is read, then one of the cache."""
    length: int = 0
    row: int = 0


def slot_of(layers: Layers, num_tokens: int) -> SequenceSlot:
    """The slot of a prompt whose first tokens were read elsewhere; their keys and values become its own, and
    have room for what is read next."""
    pool = KVPool(max(key_GTD.shape[1] for key_GTD, _ in layers.values()))
    pool.layers = {layer: (key_GTD[None], value_GTD[None]) for layer, (key_GTD, value_GTD) in layers.items()}
    return SequenceSlot(None, pool, num_tokens)


class KVPool:
    """Keys and values of sequences with `room` tokens each, by layer: [N, G, L, D],
    made when a layer first writes.

    `slots` are the sequences that are decoded, in rows 0 to N - 1; none: the first
    row is of a prompt that is read.
    """

    def __init__(self, room: int) -> None:
        self.room, self.rows = room, 1
        self.slots: list[SequenceSlot] = []
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, key_1GTD: Tensor, value_1GTD: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, shaped after its new ones."""
        if layer not in self.layers:
            # Zeros: masked values are multiplied by zero, and garbage can be NaN.
            key, value = (
                like.new_zeros(self.rows, like.shape[1], self.room, like.shape[3]) for like in (key_1GTD, value_1GTD)
            )
            self.layers[layer] = key, value
        return self.layers[layer]

    def bytes_per_token(self) -> int:
        """Bytes of a token of one sequence, in all layers that have written."""
        tensors = (tensor for pair in self.layers.values() for tensor in pair)
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    def add(self, slot: SequenceSlot) -> None:
        """Copy a sequence into a row of this pool."""
        if len(self.slots) == self.rows:
            self.rows *= 2
        for layer, (key_NGLD, value_NGLD) in self.layers.items():
            if len(key_NGLD) < self.rows:  # as it is where memory ended while others grew
                self.layers[layer] = torch.cat([key_NGLD] * 2), torch.cat([value_NGLD] * 2)
        self._copy_row(len(self.slots), slot)
        slot.pool, slot.row = self, len(self.slots)
        self.slots.append(slot)

    def free(self, row: int) -> None:
        """Free a row; the last one takes its place."""
        last = self.slots.pop()
        if row != len(self.slots):
            self._copy_row(row, last)
            self.slots[row], last.row = last, row

    def _copy_row(self, row: int, slot: SequenceSlot) -> None:
        """Copy what was read of a sequence into a row; zeros follow."""
        for layer, (key_NGLD, value_NGLD) in slot.pool.layers.items():
            layer_pool = self.of(layer, key_NGLD[:1], value_NGLD[:1])
            for to_NGLD, from_NGLD in zip(layer_pool, (key_NGLD, value_NGLD), strict=True):
                to_NGLD[row, :, : slot.length] = from_NGLD[slot.row, :, : slot.length]
                to_NGLD[row, :, slot.length :] = 0  # an earlier sequence's values are masked, but 0 times NaN is NaN


class KVCache:
    """The pools in use, by their room."""

    def __init__(self) -> None:
        self.pools: dict[int, KVPool] = {}

    @property
    def slots(self) -> list[SequenceSlot]:
        """All sequences that are decoded, in the order of the pools and their rows."""
        return [slot for pool in self.pools.values() for slot in pool.slots]

    def add(self, slot: SequenceSlot) -> None:
        """Give a sequence a row with room for one more token."""
        room = room_for(slot.length + 1)
        self.pools.setdefault(room, KVPool(room)).add(slot)

    def free(self, pool: KVPool, row: int) -> None:
        """Free a row and, with its last one, the pool."""
        if pool.slots:
            pool.free(row)
            if not pool.slots:
                del self.pools[pool.room]

    def make_room(self) -> None:
        """Move every sequence that fills its room to the next pool."""
        for slot in self.slots:
            pool, row = slot.pool, slot.row
            if slot.length == pool.room:
                self.add(slot)
                self.free(pool, row)


class DecodeRows:
    """A pool's tokens in a pass: one a row, from token `first` of the pass."""

    def __init__(self, pool: KVPool, first: int, device: torch.device) -> None:
        lengths = [slot.length for slot in pool.slots]
        self.pool, self.first, self.longest = pool, first, max(lengths) + 1
        self.positions_N = torch.tensor(lengths, device=device)
        self.index_N = torch.arange(len(lengths), device=device)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor | None] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[N, 1, 1, L], bool or added to scores; None if every row reads everything."""
        key = (window, dtype)
        if key not in self._masks:
            places_1L = torch.arange(self.longest, device=self.positions_N.device)[None]
            last_N1 = self.positions_N[:, None]
            seen_NL = places_1L <= last_N1
            if window is not None:
                seen_NL &= places_1L > last_N1 - window
            mask = None if bool(seen_NL.all()) else seen_NL[:, None, None]
            if mask is not None and dtype != torch.bool:
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
            self._masks[key] = mask
        return self._masks[key]


PrefillSpan = tuple[SequenceSlot, slice]
"""A sequence, and the place in a pass of the tokens of its prompt behind those that were read before."""


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """The sequences of the tokens of a forward pass: rows of pools, then parts of prompts."""

    rows: Sequence[DecodeRows]
    spans: Sequence[PrefillSpan]
    segments: Segments
    """Keeps the masks of prompts that are read in parts."""


_New = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values of all tokens of a pass."""


def cached_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: BatchLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, D]: every token reads the earlier ones of its own sequence, and is kept for later ones.

    Without `layout` it is `attention.packed_attention`. Raises UnsupportedAttentionError for attention sinks
    and position biases, and for layers without a number.
    """
    if layout is None:
        others |= {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap}
        return attention.packed_attention(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **others)
    layer = getattr(module, "layer_idx", None)
    if layer is None or others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise UnsupportedAttentionError("its attention has sinks, position biases, or layers without a number")
    attention.trace_call(sliding_window)
    options = AttentionOptions(True, 0.0, scaling, sliding_window, softcap)
    new = (query_1HTD, key_1GTD, value_1GTD)
    parts = [_decode(rows, layer, new, options) for rows in layout.rows]
    parts += [_prefill(span, layer, new, options, layout.segments) for span in layout.spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _decode(rows: DecodeRows, layer: int, new: _New, how: AttentionOptions) -> Tensor:
    """[N, H, D]"""
    query_1HTD, key_1GTD, value_1GTD = new
    num = len(rows.pool.slots)
    place = slice(rows.first, rows.first + num)
    key_NGLD, value_NGLD = rows.pool.of(layer, key_1GTD, value_1GTD)
    key_NGLD[rows.index_N, :, rows.positions_N] = key_1GTD[0, :, place].transpose(0, 1)
    value_NGLD[rows.index_N, :, rows.positions_N] = value_1GTD[0, :, place].transpose(0, 1)
    k_NGLD, v_NGLD = key_NGLD[:num, :, : rows.longest], value_NGLD[:num, :, : rows.longest]
    q_NHD = query_1HTD[0, :, place].transpose(0, 1)
    if how.softcap is not None:
        mask = rows.mask(how.window, torch.bool)
        return explicit_attention(q_NHD[:, :, None], k_NGLD, v_NGLD, mask, how)[:, :, 0]
    # Heads that share keys are queries of one row, so that no keys are copied for them.
    q_NGRD = torch.unflatten(q_NHD, 1, (k_NGLD.shape[1], -1))
    mask = rows.mask(how.window, q_NGRD.dtype)
    out_NGRD = F.scaled_dot_product_attention(q_NGRD, k_NGLD, v_NGLD, attn_mask=mask, scale=how.scaling)
    return out_NGRD.flatten(1, 2)


def repeats_keys(query: Tensor) -> bool:
    """Whether keys are copied for each of the heads that share them, where there is a mask: on a card torch has
    no kernel for both, and keeps all scores."""
    return query.device.type == "cuda"


def _prefill(span: PrefillSpan, layer: int, new: _New, how: AttentionOptions, segments: Segments) -> Tensor:
    """[T of the span, H, D]"""
    (query_1HTD, key_1GTD, value_1GTD), (slot, place) = new, span
    length, num = slot.length, place.stop - place.start
    stop = length + num
    key_1GLD, value_1GLD = slot.pool.of(layer, key_1GTD, value_1GTD)
    key_1GLD[:, :, length:stop] = key_1GTD[:, :, place]
    value_1GLD[:, :, length:stop] = value_1GTD[:, :, place]
    # The first key that the first query's window reaches.
    first = 0 if how.window is None else max(0, length - how.window + 1)
    q_1HQD, k_1GKD, v_1GKD = query_1HTD[:, :, place], key_1GLD[:, :, first:stop], value_1GLD[:, :, first:stop]
    num_keys = stop - first
    window = num_keys if how.window is None else min(how.window, num_keys)
    if how.softcap is not None:
        band = segments.band(num, num_keys, window)
        return explicit_attention(q_1HQD, k_1GKD, v_1GKD, band, how)[0].transpose(0, 1)
    causal = num == num_keys == window
    mask = None if causal else segments.band(num, num_keys, window)
    shared = q_1HQD.shape[1] != k_1GKD.shape[1]
    if shared and mask is not None and repeats_keys(q_1HQD):
        num = q_1HQD.shape[1] // k_1GKD.shape[1]
        k_1GKD, v_1GKD, shared = k_1GKD.repeat_interleave(num, 1), v_1GKD.repeat_interleave(num, 1), False
    out_1HQD = F.scaled_dot_product_attention(
        q_1HQD, k_1GKD, v_1GKD, attn_mask=mask, is_causal=causal, scale=how.scaling, enable_gqa=shared
    )
    return out_1HQD[0].transpose(0, 1)
