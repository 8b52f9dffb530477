"""Attention over packed rows: no padding, no mask, and no row reads another.

A model that uses it is called with input_ids [1, T], positions that restart with every row, and the keyword `segments`,
which transformers passes to the attention function and keeps for the recomputation of a checkpointed layer. Without
`segments` (generation, padded batches) it is transformers' own sdpa attention. `packing_check` finds out whether a
model's answers are those of one row at a time.

A packed batch consists of pieces: a piece is a row; or where rows share a prefix, the prefix or the rest of one of the
rows. A piece reads its prefix, which another piece computes, and itself.
"""

# B rows, H heads, T tokens, D head size, S pieces of equal length, Q queries, K keys (of all pieces in a row),
# G groups of heads that share keys, R queries of all heads of a group, C pieces that share a prefix, P its tokens

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.models import short_row_attention as short_rows
from tunesmith.models.short_row_attention import BlockLayout, RowSize
from tunesmith.types import Piece


@dataclass(frozen=True, slots=True)
class Segments:
    """The pieces of one packed batch, in order."""

    sizes: tuple[tuple[int, int], ...]
    """(queries, keys) of each."""
    device: torch.device
    cu_seqlens_q: Tensor | None = None
    """int32 [pieces + 1], cumulative queries; on CUDA only, for the varlen kernel."""
    cu_seqlens_k: Tensor | None = None
    shared: SharedPrefixes | None = None
    """None: no piece has a prefix, so keys are read where they are."""
    bands: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, compare=False)
    """Masks of a sliding window, by (Q, K, window)."""
    layouts: dict[Any, Any] = field(default_factory=dict, compare=False)
    """Block layouts of `short_row_attention` for these pieces."""

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device) -> Segments:
        """Whole rows."""
        return cls.sharing([Piece(length) for length in lengths], device=device)

    @classmethod
    def sharing(cls, pieces: Sequence[Piece], *, device: torch.device) -> Segments:
        """Pieces, some of which read a prefix."""
        shared = SharedPrefixes.of(pieces, device) if any(piece.prefix for piece in pieces) else None
        sizes = [(piece.tokens, piece.keys) for piece in pieces]

        def starts(sizes: Sequence[int]) -> Tensor | None:
            if device.type != "cuda":
                return None
            return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

        queries, keys = zip(*sizes, strict=True)
        return cls(tuple(sizes), device, starts(queries), starts(keys), shared)

    def keys(self, tensor_1GTD: Tensor) -> Tensor:
        """[1, G, K, D] from [1, G, T, D]: keys or values as the pieces read them, a prefix once for each reader."""
        if self.shared is None:
            return tensor_1GTD
        flat_TF = tensor_1GTD[0].transpose(0, 1).flatten(1)
        spread_KF: Tensor = _Spread.apply(flat_TF, self.shared)  # type: ignore[no-untyped-call]
        return spread_KF.view(len(spread_KF), tensor_1GTD.shape[1], -1).transpose(0, 1)[None]

    def band(self, num_queries: int, num_keys: int, window: int) -> Tensor:
        """bool [Q, K]: the last Q of K tokens, each reading itself and the `window` - 1 before it."""
        key = (num_queries, num_keys, window)
        if key not in self.bands:
            queries_Q1 = torch.arange(num_keys - num_queries, num_keys, device=self.device)[:, None]
            keys_K = torch.arange(num_keys, device=self.device)
            self.bands[key] = (keys_K <= queries_Q1) & (keys_K > queries_Q1 - window)
        return self.bands[key]


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Prefixes and the pieces that read them."""

    index_K: Tensor
    """The token of each key."""
    own_T: Tensor
    """The key of each token, in the piece that computes it."""
    families: tuple[tuple[int, Tensor], ...]
    """For each prefix its first token, and [C, P] the keys of its tokens in the pieces that read it."""

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> SharedPrefixes:
        index, own = [], []
        readers: dict[tuple[int, int], list[Tensor]] = {}
        first_token = first_key = 0
        for piece in pieces:
            if piece.prefix:
                index.append(torch.arange(piece.start, piece.start + piece.prefix))
                places = torch.arange(first_key, first_key + piece.prefix)
                readers.setdefault((piece.start, piece.prefix), []).append(places)
            index.append(torch.arange(first_token, first_token + piece.tokens))
            own.append(torch.arange(first_key + piece.prefix, first_key + piece.keys))
            first_token += piece.tokens
            first_key += piece.keys
        families = tuple((start, torch.stack(places).to(device)) for (start, _), places in readers.items())
        return cls(torch.cat(index).to(device), torch.cat(own).to(device), families)


class _Spread(torch.autograd.Function):
    """Tokens as keys. Backward: the gradients of a prefix from all its readers are summed in float32."""

    @staticmethod
    def forward(ctx: Any, flat_TF: Tensor, shared: SharedPrefixes) -> Tensor:
        ctx.shared = shared
        return flat_TF.index_select(0, shared.index_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KF: Tensor) -> tuple[Tensor, None]:
        wide = torch.promote_types(grad_KF.dtype, torch.float32)
        grad_TF = grad_KF.index_select(0, ctx.shared.own_T)
        for start, places_CP in ctx.shared.families:
            readers_CPF = grad_KF.index_select(0, places_CP.flatten()).view(*places_CP.shape, -1)
            here = grad_TF[start : start + places_CP.shape[1]]
            here.copy_(readers_CPF.sum(0, dtype=wide).add_(here))
        return grad_TF, None


NAME, PLAIN = "tunesmith_packed", "tunesmith_packed_plain"


class UnsupportedAttentionError(Exception):
    """The model needs something of its attention that the packed one does not do."""


@dataclass(slots=True)
class AttentionTrace:
    """The attention calls of a packed forward pass: read by the packing check."""

    calls: int = 0
    """Calls of the packed attention: none means that the model has an attention of its own."""
    windows: set[int | None] = field(default_factory=set)
    """Sliding windows that reached the attention."""
    local_masks: set[int] = field(default_factory=set)
    """Windows or chunks for which the model wanted a mask."""


_TRACE: ContextVar[AttentionTrace | None] = ContextVar("tunesmith_packed_forward", default=None)


@contextmanager
def packed_forward() -> Iterator[AttentionTrace]:
    """Around the forward of a packed batch: no mask is built. Not needed for the backward.

    A nested one shares the trace of the outer one.
    """
    trace = _TRACE.get() or AttentionTrace()
    token = _TRACE.set(trace)
    try:
        yield trace
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
    for name, attend in ((NAME, packed_attention), (PLAIN, partial(packed_attention, short_products=False))):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, packed_mask)


def use_packed_attention(model: PreTrainedModel, *, plain: bool = False) -> None:
    """Let the model run packed batches; generation and padded batches are as before. `plain`: by torch's kernels alone.

    Raises UnsupportedAttentionError for an encoder–decoder.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedAttentionError("it is an encoder–decoder")
    register()
    model.set_attn_implementation(PLAIN if plain else NAME)


def packed_mask(*args: Any, **settings: Any) -> Tensor | None:
    """sdpa's mask; None in a packed forward, where T × T would be built to be thrown away."""
    trace = _TRACE.get()
    if trace is None:
        return sdpa_mask(*args, **settings)  # type: ignore[no-any-return]
    if settings.get("local_size") is not None:
        trace.local_masks.add(settings["local_size"])
    return None


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """Options of the step from scores to weights."""

    causal: bool
    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None
    short_products: bool = True
    """Short rows may be computed by `short_row_attention`."""


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

    The signature is that of transformers' attention functions. Raises UnsupportedAttentionError for attention sinks,
    position biases and windows in both directions.
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
    key_BHTD, value_BHTD = segments.keys(key_BHTD), segments.keys(value_BHTD)
    if _has_varlen(query_BHTD, value_BHTD, options):
        return _varlen(query_BHTD, key_BHTD, value_BHTD, segments, options), None
    return _by_pieces(query_BHTD, key_BHTD, value_BHTD, segments, options), None


def _by_pieces(
    query_1HTD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, segments: Segments, options: AttentionOptions
) -> Tensor:
    """[1, T, H, D]: stretches of short pieces by block products, others by one kernel call for each run of equals."""
    longest = 0
    if options.short_products and short_rows.is_supported(
        query_1HTD, value_1GKD, dropout=options.dropout, softcap=options.softcap
    ):
        most = short_rows.LONGEST_DROPPED if options.dropout else short_rows.LONGEST
        longest = min(most, options.window or most)
    stretches = [tuple(some) for _, some in groupby(segments.sizes, key=lambda size: max(size) <= longest or size)]
    # One split for all: its backward is one concatenation, that of a slice would be a full tensor of zeros each.
    queries = torch.split(query_1HTD, [sum(tokens for tokens, _ in some) for some in stretches], dim=2)
    num_keys = [sum(keys for _, keys in some) for some in stretches]
    keys, values = (torch.split(tensor, num_keys, dim=2) for tensor in (key_1GKD, value_1GKD))
    out = []
    for some, query, key, value in zip(stretches, queries, keys, values, strict=True):
        if max(some[0]) <= longest:
            layout = _layout(segments, some, query, key, causal=options.causal)
            out.append(
                short_rows.short_row_attention(
                    query, key, value, layout, scaling=options.scaling, dropout=options.dropout
                )
            )
            continue
        q_SHQD, k_SHKD, v_SHKD = (
            torch.unflatten(part, 2, (len(some), -1))[0].transpose(0, 1) for part in (query, key, value)
        )
        out.append(_equal_pieces(q_SHQD, k_SHKD, v_SHKD, segments, options).transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _layout(
    segments: Segments, rows: tuple[RowSize, ...], query_1HTD: Tensor, key_1GKD: Tensor, *, causal: bool
) -> BlockLayout:
    """Made in the first layer of a pass and used by all others."""
    heads = query_1HTD.shape[1], key_1GKD.shape[1]
    name = (rows, heads, causal, query_1HTD.dtype)
    if name not in segments.layouts:
        segments.layouts[name] = BlockLayout.of(
            rows, num_heads=heads[0], num_groups=heads[1], causal=causal, like=query_1HTD
        )
    layout: BlockLayout = segments.layouts[name]
    return layout


def _equal_pieces(
    q_SHQD: Tensor, k_SHKD: Tensor, v_SHKD: Tensor, segments: Segments, options: AttentionOptions
) -> Tensor:
    """[S, H, Q, D]: pieces of equal length; causal queries are the last of the keys."""
    num_queries, num_keys = q_SHQD.shape[2], k_SHKD.shape[2]
    first = num_keys - num_queries
    limited = options.causal and options.window is not None and options.window < num_keys
    window = options.window if limited else None
    if options.softcap is not None:
        mask_QK = segments.band(num_queries, num_keys, window or num_keys) if options.causal else None
        return explicit_attention(q_SHQD, k_SHKD, v_SHKD, mask_QK, options)
    sdpa = partial(
        F.scaled_dot_product_attention,
        dropout_p=options.dropout,
        scale=options.scaling,
        enable_gqa=q_SHQD.shape[1] != k_SHKD.shape[1],
    )
    if window is None:
        mask_QK = segments.band(num_queries, num_keys, num_keys) if options.causal and first else None
        return sdpa(q_SHQD, k_SHKD, v_SHKD, attn_mask=mask_QK, is_causal=options.causal and mask_QK is None)
    out = []
    # A window of queries reads at most two windows of keys: memory and time stay linear in the length.
    for start in range(first, num_keys, window):
        stop, oldest = min(start + window, num_keys), max(0, start - window + 1)
        out.append(
            sdpa(
                q_SHQD[:, :, start - first : stop - first],
                k_SHKD[:, :, oldest:stop],
                v_SHKD[:, :, oldest:stop],
                attn_mask=segments.band(stop - start, stop - oldest, window),
            )
        )
    return torch.cat(out, dim=2)


def _unpacked_capped(
    query_BHQD: Tensor, key_BHKD: Tensor, value_BHKD: Tensor, mask: Tensor | None, options: AttentionOptions
) -> Tensor:
    """[B, Q, H, D]: sdpa with a softcap. `mask` is sdpa's: boolean, or None for full causal attention."""
    num_queries = query_BHQD.shape[2]
    if mask is None and options.causal and num_queries > 1:
        key_BHKD, value_BHKD = key_BHKD[:, :, :num_queries], value_BHKD[:, :, :num_queries]
        mask = query_BHQD.new_ones(num_queries, num_queries, dtype=torch.bool).tril()
    return explicit_attention(query_BHQD, key_BHKD, value_BHKD, mask, options).transpose(1, 2)


def explicit_attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_QK: Tensor | None, options: AttentionOptions
) -> Tensor:
    """[B, H, Q, D]: softmax(q k' · scaling) v, with scores in float32, squashed to softcap · tanh(score / softcap).

    Sources: Vaswani et al. 2017, section 3.2.1; for softcap Gemma 2 (2024), section 2.
    """
    num_groups, num_queries, size = k_BHKD.shape[1], q_BHQD.shape[2], q_BHQD.shape[3]
    # Heads that share keys are stacked: one product a group, without a copy of the keys for each.
    q_BGRD = torch.unflatten(q_BHQD, 1, (num_groups, -1)).flatten(2, 3).float()
    scale = size**-0.5 if options.scaling is None else options.scaling
    scores_BGRK = q_BGRD @ k_BHKD.float().transpose(-1, -2) * scale
    if options.softcap is not None:
        scores_BGRK = options.softcap * torch.tanh(scores_BGRK / options.softcap)
    if mask_QK is not None:
        barred_RK = ~mask_QK.repeat(*[1] * (mask_QK.dim() - 2), scores_BGRK.shape[2] // num_queries, 1)
        # The lowest number, not -inf: a padding query that may read nothing would become NaN.
        scores_BGRK = scores_BGRK.masked_fill(barred_RK, torch.finfo(torch.float32).min)
    weights_BGRK = F.dropout(scores_BGRK.softmax(-1).to(v_BHKD.dtype), options.dropout)
    return torch.unflatten(weights_BGRK @ v_BHKD, 2, (-1, num_queries)).flatten(1, 2)


@cache
def _varlen_kernel() -> Any:
    """torch's variable-length flash attention; None in versions without windows or grouped heads (torch 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)
    return varlen_attn if known else None


def _has_varlen(query_1HTD: Tensor, value_1GKD: Tensor, options: AttentionOptions) -> bool:
    """True for causal attention in half precision with head sizes up to 256, without dropout or softcap."""
    return (
        query_1HTD.is_cuda
        and query_1HTD.dtype in (torch.bfloat16, torch.float16)
        and query_1HTD.shape[-1] == value_1GKD.shape[-1] <= 256
        and options.causal
        and not options.dropout
        and options.softcap is None
        and torch.cuda.get_device_capability(query_1HTD.device) >= (8, 0)
        and _varlen_kernel() is not None
    )


def _varlen(
    query_1HTD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, segments: Segments, options: AttentionOptions
) -> Tensor:
    """[1, T, H, D]. A window counts the token itself; the kernel's counts those to its left, and 0 to its right.

    Where a piece has more keys than queries, the last query reads up to the last key (Dao 2023, FlashAttention-2).
    """
    q_THD, k_KGD, v_KGD = (tensor[0].transpose(0, 1) for tensor in (query_1HTD, key_1GKD, value_1GKD))
    out_THD: Tensor = _varlen_kernel()(
        q_THD,
        k_KGD,
        v_KGD,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        max(queries for queries, _ in segments.sizes),
        max(keys for _, keys in segments.sizes),
        scale=options.scaling,
        window_size=(-1 if options.window is None else options.window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_KGD.shape[1],
    )
    return out_THD[None]


def longrope_limit(config: Any) -> int | None:
    """Most tokens of a text that is computed with the rotary frequencies for short texts; None: there is one set.

    Of a model with two sets (longrope: Phi-3 and Phi-4-mini with long contexts) transformers takes one set for all
    rows of a pass, by the largest position in it: a longer row changes what the others say, also where rows are padded.
    """
    config = config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    of_layers = [settings] if "rope_type" in settings else settings.values()  # or by type of layer
    usual = getattr(config, "original_max_position_embeddings", None) or getattr(config, "max_position_embeddings", 0)
    limits = [
        int(one.get("original_max_position_embeddings") or usual or 0)
        for one in of_layers
        if isinstance(one, Mapping) and one.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def longrope_conflict(config: Any, longest: int) -> str:
    """Why texts cannot share a pass where one has `longest` tokens; "" if they can."""
    limit = longrope_limit(config)
    if limit is None or longest <= limit:
        return ""
    return f"a text of more than {limit:,} tokens changes the positions (longrope) of all others in its pass"
