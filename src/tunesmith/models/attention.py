"""Attention over whole examples that stand end to end in one row: no padding, no mask, and none reads another.

A model that runs this attention is called with input_ids [1, T], positions that restart with every example, and the
keyword `segments`, which transformers hands down to the attention function and keeps for the recomputation of a
checkpointed layer. Without `segments` (generation, padded batches) it is transformers' own sdpa attention.

Not every model can: whether the answer is the same as one example at a time is asked of the model itself, by
`agreement.ragged_agrees`.
"""

# B rows, H heads, T tokens, D head size, S pieces of equal length, Q queries, K keys,
# G groups of heads that share keys, R queries of all heads of a group

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.models import grouped, varlen
from tunesmith.models.blocks import Layout, Row
from tunesmith.models.segments import Segments

NAME, PLAIN = "tunesmith_ragged", "tunesmith_ragged_plain"


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that the ragged one does not do."""


@dataclass(slots=True)
class Trace:
    """What a ragged pass asked for: read by the self-check."""

    calls: int = 0
    """Calls of the ragged attention: none means that the model has an attention of its own."""
    windows: set[int | None] = field(default_factory=set)
    """Sliding windows that reached the attention."""
    local_masks: set[int] = field(default_factory=set)
    """Windows or chunks for which the model wanted a mask."""


_TRACE: ContextVar[Trace | None] = ContextVar("tunesmith_ragged_pass", default=None)


@contextmanager
def ragged_pass() -> Iterator[Trace]:
    """Around the forward of a ragged batch: no mask is built. Nothing needs to stay open for the backward.

    One inside another tells the outer one's trace.
    """
    trace = _TRACE.get() or Trace()
    token = _TRACE.set(trace)
    try:
        yield trace
    finally:
        _TRACE.reset(token)


def trace_call(window: int | None) -> Trace | None:
    """Note a call of an attention in the open ragged pass; None outside of one."""
    trace = _TRACE.get()
    if trace is not None:
        trace.calls += 1
        trace.windows.add(window)
    return trace


def register() -> None:
    """Make the attention known to transformers by its names; calling it again changes nothing."""
    for name, attend in ((NAME, ragged_attention), (PLAIN, partial(ragged_attention, products=False))):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)


def use_ragged(model: PreTrainedModel, *, plain: bool = False) -> None:
    """Let the model run ragged batches. Generation and padded batches go on as before. `plain`: by torch's own kernels,
    to which the faster way is held equal.

    Raises UnsupportedAttentionError for an encoder–decoder.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedAttentionError("it is an encoder–decoder")
    register()
    model.set_attn_implementation(PLAIN if plain else NAME)


def mask(*args: Any, **settings: Any) -> Tensor | None:
    """The mask that sdpa would get, or none in a ragged pass, where T × T would be built to be thrown away."""
    trace = _TRACE.get()
    if trace is None:
        return sdpa_mask(*args, **settings)  # type: ignore[no-any-return]
    if settings.get("local_size") is not None:
        trace.local_masks.add(settings["local_size"])
    return None


def ragged_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    products: bool = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, D]: each example of `segments` attended to alone; plain sdpa attention without `segments`. `products`:
    short rows may go through `grouped`.

    The signature is that of transformers' attention functions. Raises UnsupportedAttentionError for attention sinks and
    position biases.
    """
    if others.get("s_aux") is not None:
        raise UnsupportedAttentionError("its attention has sinks")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    trace = trace_call(sliding_window)
    if segments is not None and sliding_window is not None and not causal:
        raise UnsupportedAttentionError("its attention looks a limited way in both directions")
    how = How(causal, dropout, scaling, sliding_window, softcap, products)
    if segments is None:
        if trace is not None:
            raise UnsupportedAttentionError("it does not hand on to its attention where the rows are")
        if softcap is not None:
            return _plain_capped(query_BHTD, key_BHTD, value_BHTD, attention_mask, how), None
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, dropout, scaling, causal, **others
        )
    if others.get("position_bias") is not None:
        raise UnsupportedAttentionError("its attention has position biases")
    if segments.shared is not None and not causal:
        raise UnsupportedAttentionError("pieces of rows that read both ways cannot share what they begin with")
    key_BHTD, value_BHTD = segments.keys(key_BHTD), segments.keys(value_BHTD)
    if varlen.can(query_BHTD, value_BHTD, causal=causal, dropout=dropout, softcap=softcap):
        return varlen.attend(query_BHTD, key_BHTD, value_BHTD, segments, scaling=scaling, window=sliding_window), None
    return _by_pieces((query_BHTD, key_BHTD, value_BHTD), segments, how), None


@dataclass(frozen=True, slots=True)
class How:
    """How scores become weights."""

    causal: bool
    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None
    products: bool = True


Three = tuple[Tensor, Tensor, Tensor]
"""Queries [1, H, T, D], keys and values [1, G, K, D]."""


def _by_pieces(three: Three, segments: Segments, how: How) -> Tensor:
    """[1, T, H, D]: stretches of short pieces by grouped products, others by one kernel call for each run of equals."""
    query_1HTD, key_1GKD, value_1GKD = three
    products = how.products and grouped.can(query_1HTD, value_1GKD, dropout=how.dropout, softcap=how.softcap)
    most = grouped.LONGEST_DROPPED if how.dropout else grouped.LONGEST
    longest = min(most, how.window or most) if products else 0
    stretches = [tuple(some) for _, some in groupby(segments.sizes, key=lambda size: max(size) <= longest or size)]
    # One split for all: its backward is one concatenation, that of a slice would be a full tensor of zeros each.
    queries = torch.split(query_1HTD, [sum(tokens for tokens, _ in some) for some in stretches], dim=2)
    num_keys = [sum(keys for _, keys in some) for some in stretches]
    keys, values = (torch.split(tensor, num_keys, dim=2) for tensor in (key_1GKD, value_1GKD))
    out = []
    for some, query, key, value in zip(stretches, queries, keys, values, strict=True):
        if max(some[0]) <= longest:
            layout = _layout(segments, some, query, key, causal=how.causal)
            out.append(grouped.attend(query, key, value, layout, scaling=how.scaling, dropout=how.dropout))
            continue
        q_SHQD, k_SHKD, v_SHKD = (
            torch.unflatten(part, 2, (len(some), -1))[0].transpose(0, 1) for part in (query, key, value)
        )
        out.append(_attend(q_SHQD, k_SHKD, v_SHKD, segments, how).transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _layout(segments: Segments, rows: tuple[Row, ...], query_1HTD: Tensor, key_1GKD: Tensor, *, causal: bool) -> Layout:
    """Made by the first layer that asks for it."""
    heads = query_1HTD.shape[1], key_1GKD.shape[1]
    name = (rows, heads, causal, query_1HTD.dtype)
    if name not in segments.layouts:
        segments.layouts[name] = Layout.of(
            rows, num_heads=heads[0], num_groups=heads[1], causal=causal, like=query_1HTD
        )
    layout: Layout = segments.layouts[name]
    return layout


def _attend(q_SHQD: Tensor, k_SHKD: Tensor, v_SHKD: Tensor, segments: Segments, how: How) -> Tensor:
    """Where it is causal the queries are the last of the keys."""
    num_queries, num_keys = q_SHQD.shape[2], k_SHKD.shape[2]
    first = num_keys - num_queries
    window = how.window if how.causal and how.window is not None and how.window < num_keys else None
    if how.softcap is not None:
        mask_QK = segments.band(num_queries, num_keys, window or num_keys) if how.causal else None
        return spelled_out(q_SHQD, k_SHKD, v_SHKD, mask_QK, how)
    gqa = q_SHQD.shape[1] != k_SHKD.shape[1]
    if window is None:
        mask_QK = segments.band(num_queries, num_keys, num_keys) if how.causal and first else None
        return F.scaled_dot_product_attention(
            q_SHQD,
            k_SHKD,
            v_SHKD,
            attn_mask=mask_QK,
            dropout_p=how.dropout,
            is_causal=how.causal and mask_QK is None,
            scale=how.scaling,
            enable_gqa=gqa,
        )
    out = []
    # A window's worth of queries reads at most two windows of keys: memory and time stay linear in the length.
    for start in range(first, num_keys, window):
        stop, oldest = min(start + window, num_keys), max(0, start - window + 1)
        out.append(
            F.scaled_dot_product_attention(
                q_SHQD[:, :, start - first : stop - first],
                k_SHKD[:, :, oldest:stop],
                v_SHKD[:, :, oldest:stop],
                attn_mask=segments.band(stop - start, stop - oldest, window),
                dropout_p=how.dropout,
                scale=how.scaling,
                enable_gqa=gqa,
            )
        )
    return torch.cat(out, dim=2)


def _plain_capped(query_BHQD: Tensor, key_BHKD: Tensor, value_BHKD: Tensor, mask: Tensor | None, how: How) -> Tensor:
    """[B, Q, H, D]: what sdpa would do if it knew softcap. `mask` is sdpa's: boolean, or None for "causal, in full"."""
    num_queries = query_BHQD.shape[2]
    if mask is None and how.causal and num_queries > 1:
        key_BHKD, value_BHKD = key_BHKD[:, :, :num_queries], value_BHKD[:, :, :num_queries]
        mask = query_BHQD.new_ones(num_queries, num_queries, dtype=torch.bool).tril()
    return spelled_out(query_BHQD, key_BHKD, value_BHKD, mask, how).transpose(1, 2)


def spelled_out(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_QK: Tensor | None, how: How) -> Tensor:
    """[B, H, Q, D]: softmax(q k' · scaling) v, with scores in float32, and squashed to softcap · tanh(score / softcap).

    Sources: Vaswani et al. 2017, section 3.2.1; for softcap Gemma 2 (2024), section 2.
    """
    num_groups, num_queries, size = k_BHKD.shape[1], q_BHQD.shape[2], q_BHQD.shape[3]
    # Heads that share keys stand below each other: one product a group, without a copy of the keys for each.
    q_BGRD = torch.unflatten(q_BHQD, 1, (num_groups, -1)).flatten(2, 3).float()
    scores_BGRK = q_BGRD @ k_BHKD.float().transpose(-1, -2) * (size**-0.5 if how.scaling is None else how.scaling)
    if how.softcap is not None:
        scores_BGRK = how.softcap * torch.tanh(scores_BGRK / how.softcap)
    if mask_QK is not None:
        barred_RK = ~mask_QK.repeat(*[1] * (mask_QK.dim() - 2), scores_BGRK.shape[2] // num_queries, 1)
        # The lowest number, not -inf: a padding query that may read nothing would turn into NaN.
        scores_BGRK = scores_BGRK.masked_fill(barred_RK, torch.finfo(torch.float32).min)
    weights_BGRK = F.dropout(scores_BGRK.softmax(-1).to(v_BHKD.dtype), how.dropout)
    return torch.unflatten(weights_BGRK @ v_BHKD, 2, (-1, num_queries)).flatten(1, 2)
