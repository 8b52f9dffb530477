"""Places of the pieces of a packed batch, and attention of rows of equal length.

A packed batch consists of pieces: a piece is a row; or where rows share a prefix, the prefix or the rest of one
of the rows. A piece reads what is before it in its row, which other pieces compute, and itself.
"""

# T tokens, H heads, D head size, S rows of equal length, Q queries, K keys (of all pieces in a row), B rows, G
# groups of heads that share keys, R queries of all heads of a group, C pieces that share a prefix, P its tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tunesmith.models.machine import to_device
from tunesmith.types import Segment, Span


class UnsupportedAttentionError(Exception):
    """The model needs something of its attention that the packed one does not do."""


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
    """Values that kernels derive from these pieces in the first layer of a pass, for all others."""

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device) -> Segments:
        """Whole rows."""
        return cls.sharing([Segment(length) for length in lengths], device=device)

    @classmethod
    def sharing(cls, pieces: Sequence[Segment], *, device: torch.device) -> Segments:
        """Pieces, some of which read a prefix."""
        shared = SharedPrefixes.of(pieces, device) if any(piece.before for piece in pieces) else None
        sizes = [(piece.tokens, piece.keys) for piece in pieces]

        if device.type != "cuda":
            return cls(tuple(sizes), device, shared=shared)
        starts_Q, starts_K = (
            to_device(torch.tensor([0, *accumulate(counts)], dtype=torch.int32), device)
            for counts in zip(*sizes, strict=True)
        )
        return cls(tuple(sizes), device, starts_Q, starts_K, shared)

    def keys(self, tensor_1GTD: Tensor) -> Tensor:
        """[1, G, K, D] from [1, G, T, D]: keys or values as pieces read them, a prefix once for each."""
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
    def of(cls, pieces: Sequence[Segment], device: torch.device) -> SharedPrefixes:
        index, computed = [], []
        readers: dict[Span, list[Tensor]] = {}
        first_token = first_key = 0
        for piece in pieces:
            for start, num in piece.before:
                index.append(torch.arange(start, start + num))
                readers.setdefault((start, num), []).append(torch.arange(first_key, first_key + num))
                first_key += num
            index.append(torch.arange(first_token, first_token + piece.tokens))
            computed.append(torch.arange(first_key, first_key + piece.tokens))
            first_token += piece.tokens
            first_key += piece.tokens
        families = tuple((start, to_device(torch.stack(places), device)) for (start, _), places in readers.items())
        return cls(to_device(torch.cat(index), device), to_device(torch.cat(computed), device), families)


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
        if grad_KF.device.type == "cuda":  # one kernel for all prefixes
            return _summed(grad_KF, ctx.shared, wide), None
        grad_TF = grad_KF.index_select(0, ctx.shared.own_T)
        for start, places_CP in ctx.shared.families:
            readers_CPF = grad_KF.index_select(0, places_CP.flatten()).view(*places_CP.shape, -1)
            here = grad_TF[start : start + places_CP.shape[1]]
            here.copy_(readers_CPF.sum(0, dtype=wide).add_(here))
        return grad_TF, None


def _summed(grad_KF: Tensor, shared: SharedPrefixes, wide: torch.dtype) -> Tensor:
    """[T, F], the sum over the keys of each token, added in the type `wide`."""
    sums_TF = grad_KF.new_zeros(len(shared.own_T), grad_KF.shape[1], dtype=wide)
    return sums_TF.index_add_(0, shared.index_K, grad_KF.to(wide)).to(grad_KF.dtype)


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


def equal_rows(
    q_SHQD: Tensor,
    k_SHKD: Tensor,
    v_SHKD: Tensor,
    segments: Segments,
    options: AttentionOptions,
    *,
    keys_there: Tensor | None = None,
) -> Tensor:
    """[S, H, Q, D]: attention of rows of equal length; causal queries are the last of the keys.

    `keys_there`: bool [S, 1, 1, K] for rows that are read both ways, if some of them are shorter.
    """
    num_queries, num_keys = q_SHQD.shape[2], k_SHKD.shape[2]
    first = num_keys - num_queries
    limited = options.causal and options.window is not None and options.window < num_keys
    window = options.window if limited else None
    if options.softcap is not None:
        mask_QK = segments.band(num_queries, num_keys, window or num_keys) if options.causal else keys_there
        return explicit_attention(q_SHQD, k_SHKD, v_SHKD, mask_QK, options)
    sdpa = partial(
        F.scaled_dot_product_attention,
        dropout_p=options.dropout,
        scale=options.scaling,
        enable_gqa=q_SHQD.shape[1] != k_SHKD.shape[1],
    )
    if window is None:
        mask_QK = segments.band(num_queries, num_keys, num_keys) if options.causal and first else keys_there
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


def explicit_attention(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask_QK: Tensor | None, options: AttentionOptions
) -> Tensor:
    """[B, H, Q, D]: softmax(q k' · scaling) v, scores in float32, squashed to softcap · tanh(score / softcap).

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
