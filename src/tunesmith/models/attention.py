"""Attention over packed rows: no padding, no mask, and no row reads another.

A model that uses it is called with input_ids [1, T], positions that restart with every row, and the keyword
`segments`, which transformers passes to the attention function and keeps for the recomputation of a
checkpointed layer. Without `segments` (generation, padded batches) it is transformers' own sdpa attention.
`packing_check` finds out whether a model gives each row the answers that it gives for that row alone.
"""

# B rows, H heads, T tokens, D head size, S pieces of equal length, Q queries, K keys (of a row's pieces), G
# groups of heads that share keys, R queries of all heads of a group, C pieces with one prefix, P its tokens

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
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.models import short_row_attention as short_rows
from tunesmith.models.cuda_attention import AttentionCase, choose_kernel
from tunesmith.models.segments import (
    AttentionOptions,
    Segments,
    UnsupportedAttentionError,
    equal_rows,
    explicit_attention,
)
from tunesmith.models.short_row_attention import BlockLayout, RowSize

PACKED, PLAIN = "tunesmith_packed", "tunesmith_packed_plain"


@dataclass(slots=True)
class AttentionTrace:
    """The attention calls of a packed forward pass: read by the packing check."""

    calls: int = 0
    """Calls of the packed attention: none means that the model has an attention of its own."""
    windows: set[int | None] = field(default_factory=set)
    """Sliding windows that reached the attention."""
    local_masks: set[int] = field(default_factory=set)
    """Windows or chunks for which the model wanted a mask."""
    kernels: set[str] = field(default_factory=set)
    """Kernels of `cuda_attention` that computed it."""
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    """Layer → its keys and values [1, G, T, D], for those who go on from them; None: they are not kept."""
    looks_at_masks: bool = False
    """Whether masks are built to see what the model wants to read."""
    reads_ahead: bool = False
    """Whether one of them lets a token read what comes behind it."""


_TRACE: ContextVar[AttentionTrace | None] = ContextVar("tunesmith_packed_forward", default=None)


@contextmanager
def packed_forward() -> Iterator[AttentionTrace]:
    """A block around the forward pass of a packed batch: no mask is built in it. The backward pass needs no
    such block. A nested block shares the trace of the outer one."""
    trace = _TRACE.get() or AttentionTrace()
    token = _TRACE.set(trace)
    try:
        yield trace
    finally:
        _TRACE.reset(token)


@contextmanager
def apart() -> Iterator[None]:
    """A block in which no packed forward is open: a vision tower reads its image with masks of its own."""
    token = _TRACE.set(None)
    try:
        yield
    finally:
        _TRACE.reset(token)


def trace_call(window: int | None) -> AttentionTrace | None:
    """Record a call of an attention in the open packed forward; None outside of one."""
    trace = _TRACE.get()
    if trace is not None:
        trace.calls += 1
        trace.windows.add(window)
    return trace


def register() -> None:
    """Register the attention with transformers under its names; safe to call again."""
    masking_utils.find_packed_sequence_indices = _find_packed_rows
    for name, attend in ((PACKED, packed_attention), (PLAIN, partial(packed_attention, short_products=False))):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, packed_mask)


_transformers_find = masking_utils.find_packed_sequence_indices


def _find_packed_rows(position_ids: Tensor) -> Tensor | None:
    """transformers' search for packed rows by their positions, which a processor has to wait for if they are on
    a card; a packed forward knows its rows."""
    return None if _TRACE.get() is not None else _transformers_find(position_ids)


def use_packed_attention(model: PreTrainedModel, *, plain: bool = False) -> None:
    """Let the model run packed batches; others stay as before. `plain`: by torch's kernels alone.

    Raises UnsupportedAttentionError for an encoder–decoder.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedAttentionError("it is an encoder–decoder")
    register()
    model.set_attn_implementation(PLAIN if plain else PACKED)


def packed_mask(*args: Any, **settings: Any) -> Tensor | None:
    """sdpa's mask; None in a packed forward, where T × T would be built to be thrown away."""
    trace = _TRACE.get()
    if trace is None:
        return sdpa_mask(*args, **settings)  # type: ignore[no-any-return]
    if size := settings.get("local_size"):  # 0: Qwen2-MoE without its window
        trace.local_masks.add(size)
    if trace.looks_at_masks:
        mask = sdpa_mask(*args, **{**settings, "allow_is_causal_skip": False})
        trace.reads_ahead |= bool(mask.triu(1).any())
    return None


def packed_attention(
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
    short_products: bool = True,
    **others: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, D]: attention within each piece of `segments`; without `segments` sdpa attention.

    The signature is as in transformers' attention functions. Raises UnsupportedAttentionError for attention
    sinks, position biases and windows in both directions.
    """
    if others.get("s_aux") is not None:
        raise UnsupportedAttentionError("its attention has sinks")
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    trace = trace_call(sliding_window)
    options = AttentionOptions(causal, dropout, scaling, sliding_window, softcap, short_products)
    if segments is None:
        if trace is not None:
            raise UnsupportedAttentionError("it does not pass on to its attention where the rows are")
        if softcap is not None:
            return _unpacked_capped(query_BHTD, key_BHTD, value_BHTD, attention_mask, options), None
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query_BHTD, key_BHTD, value_BHTD, attention_mask, dropout, scaling, causal, **others
        )
    if others.get("position_bias") is not None:
        raise UnsupportedAttentionError("its attention has position biases")
    if sliding_window is not None and not causal:
        raise UnsupportedAttentionError("its attention has a window in both directions")
    if segments.shared is not None and not causal:
        raise UnsupportedAttentionError("rows that are read in both directions cannot share a prefix")
    if trace is not None and trace.kept is not None:
        trace.kept[int(getattr(module, "layer_idx", -1))] = key_BHTD, value_BHTD
    key_BHTD, value_BHTD = segments.keys(key_BHTD), segments.keys(value_BHTD)
    if query_BHTD.is_cuda:
        kernel = choose_kernel(AttentionCase.of(query_BHTD, key_BHTD, value_BHTD, segments, options), query_BHTD.device)
        if trace is not None:
            trace.kernels.add(kernel.name)
        return kernel.run(query_BHTD, key_BHTD, value_BHTD, segments, options), None
    return _by_pieces(query_BHTD, key_BHTD, value_BHTD, segments, options), None


def _by_pieces(
    query_1HTD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, segments: Segments, options: AttentionOptions
) -> Tensor:
    """[1, T, H, D]: short pieces by block products, others by a kernel call for each run of equals."""
    longest = 0
    if options.short_products:
        shared = segments.shared is not None
        most = short_rows.longest(
            query_1HTD, value_1GKD, dropout=options.dropout, softcap=options.softcap, shared=shared
        )
        longest = min(most, options.window or most)
    runs = [tuple(run) for _, run in groupby(segments.sizes, key=lambda size: max(size) <= longest or size)]
    # One split for all: its backward is one concatenation, a slice's would be a full tensor of zeros each.
    queries = torch.split(query_1HTD, [sum(tokens for tokens, _ in run) for run in runs], dim=2)
    num_keys = [sum(keys for _, keys in run) for run in runs]
    keys, values = (torch.split(tensor, num_keys, dim=2) for tensor in (key_1GKD, value_1GKD))
    out = []
    for run, query, key, value in zip(runs, queries, keys, values, strict=True):
        if max(run[0]) <= longest:
            layout = _layout(segments, run, query, key, causal=options.causal)
            out.append(
                short_rows.short_row_attention(
                    query, key, value, layout, scaling=options.scaling, dropout=options.dropout
                )
            )
            continue
        q_SHQD, k_SHKD, v_SHKD = (
            torch.unflatten(part, 2, (len(run), -1))[0].transpose(0, 1) for part in (query, key, value)
        )
        out.append(equal_rows(q_SHQD, k_SHKD, v_SHKD, segments, options).transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(out, dim=1) if len(out) > 1 else out[0].contiguous()  # which AFMoE takes a view of


def _layout(
    segments: Segments, rows: tuple[RowSize, ...], query_1HTD: Tensor, key_1GKD: Tensor, *, causal: bool
) -> BlockLayout:
    """The layout of the pieces of a pass: made in its first layer, and used by all others."""
    heads = query_1HTD.shape[1], key_1GKD.shape[1]
    name = (rows, heads, causal, query_1HTD.dtype)
    if name not in segments.layouts:
        segments.layouts[name] = BlockLayout.of(
            rows, num_heads=heads[0], num_groups=heads[1], causal=causal, like=query_1HTD
        )
    layout: BlockLayout = segments.layouts[name]
    return layout


def _unpacked_capped(
    query_BHQD: Tensor, key_BHKD: Tensor, value_BHKD: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """[B, Q, H, D]: sdpa with a softcap. `mask` is sdpa's: boolean, or None for full causal attention."""
    num_queries = query_BHQD.shape[2]
    if mask is None and options.causal and num_queries > 1:
        key_BHKD, value_BHKD = key_BHKD[:, :, :num_queries], value_BHKD[:, :, :num_queries]
        mask = query_BHQD.new_ones(num_queries, num_queries, dtype=torch.bool).tril()
    return explicit_attention(query_BHQD, key_BHKD, value_BHKD, mask, options).transpose(1, 2).contiguous()
