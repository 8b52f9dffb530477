"""Attention over whole examples that stand end to end in one row: no padding, no mask, and none reads another.

A model that runs this attention is called with input_ids [1, T], positions that restart with every example, and the
keyword `segments`, which transformers hands down to the attention function and keeps for the recomputation of a
checkpointed layer. Without `segments` (generation, padded batches) it is transformers' own sdpa attention.

Not every model can: whether the answer is the same as one example at a time is asked of the model itself, by
`agreement.ragged_agrees`.
"""

# B rows, H heads, T tokens, D head size, S segments of equal length, L their length, Q queries, K keys,
# G groups of heads that share keys, R queries of all heads of a group

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tunesmith.models import grouped, varlen

NAME, PLAIN = "tunesmith_ragged", "tunesmith_ragged_plain"


class UnsupportedAttentionError(Exception):
    """The model asks its attention for something that the ragged one does not do."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Where the examples of one ragged batch stand; made once a batch, used by every layer."""

    runs: tuple[tuple[int, int], ...]
    """Neighbours of equal length as (how many, length): one call of the kernel each."""
    longest: int
    device: torch.device
    starts: Tensor | None
    """int32 [examples + 1], where each begins and the last ends; on CUDA only, for the varlen kernel."""
    bands: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, compare=False)
    """Masks of a sliding window, by (Q, K, window)."""

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device) -> Segments:
        runs = tuple((len(list(group)), length) for length, group in groupby(lengths))
        starts = None
        if device.type == "cuda":
            starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        return cls(runs=runs, longest=max(lengths), device=device, starts=starts)

    def band(self, num_queries: int, num_keys: int, window: int) -> Tensor:
        """bool [Q, K]: the last Q of K tokens, each reading itself and the `window` - 1 before it."""
        key = (num_queries, num_keys, window)
        if key not in self.bands:
            queries_Q1 = torch.arange(num_keys - num_queries, num_keys, device=self.device)[:, None]
            keys_K = torch.arange(num_keys, device=self.device)
            self.bands[key] = (keys_K <= queries_Q1) & (keys_K > queries_Q1 - window)
        return self.bands[key]


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
    to which the faster way is held equal."""
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

    The signature is that of transformers' attention functions. Raises UnsupportedAttentionError for attention sinks
    and position biases.
    """
    if others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise UnsupportedAttentionError("its attention has sinks or position biases")
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
    if varlen.can(query_BHTD, value_BHTD, causal=causal, dropout=dropout, softcap=softcap):
        return varlen.attend(query_BHTD, key_BHTD, value_BHTD, segments, scaling=scaling, window=sliding_window), None
    return _by_runs(query_BHTD, key_BHTD, value_BHTD, segments, how), None


@dataclass(frozen=True, slots=True)
class How:
    """How scores become weights."""

    causal: bool
    dropout: float
    scaling: float | None
    window: int | None
    softcap: float | None
    products: bool = True


def _by_runs(query_1HTD: Tensor, key_1HTD: Tensor, value_1HTD: Tensor, segments: Segments, how: How) -> Tensor:
    """[1, T, H, D]: stretches of short rows by grouped products, others by one kernel call for each run of them."""
    products = how.products and grouped.can(query_1HTD, value_1HTD, dropout=how.dropout, softcap=how.softcap)
    longest = min(grouped.LONGEST, how.window or grouped.LONGEST) if products else 0
    stretches = [list(runs) for _, runs in groupby(segments.runs, key=lambda run: run[1] <= longest or run)]
    sizes = [sum(num * length for num, length in runs) for runs in stretches]
    # One split for all: its backward is one concatenation, that of a slice would be a full tensor of zeros each.
    parts = [torch.split(tensor, sizes, dim=2) for tensor in (query_1HTD, key_1HTD, value_1HTD)]
    out = []
    for runs, query, key, value in zip(stretches, *parts, strict=True):
        (num, length), *_ = runs
        if length <= longest:
            out.append(grouped.attend(query, key, value, runs, causal=how.causal, scaling=how.scaling))
            continue
        q_SHLD, k_SHLD, v_SHLD = (part.unflatten(2, (num, length))[0].transpose(0, 1) for part in (query, key, value))
        out.append(_attend(q_SHLD, k_SHLD, v_SHLD, segments, how).transpose(1, 2).flatten(0, 1)[None])
    return torch.cat(out, dim=1) if len(out) > 1 else out[0]


def _attend(q_SHLD: Tensor, k_SHLD: Tensor, v_SHLD: Tensor, segments: Segments, how: How) -> Tensor:
    length = q_SHLD.shape[2]
    window = how.window if how.causal and how.window is not None and how.window < length else None
    if how.softcap is not None:
        mask_LL = segments.band(length, length, window or length) if how.causal else None
        return spelled_out(q_SHLD, k_SHLD, v_SHLD, mask_LL, how)
    gqa = q_SHLD.shape[1] != k_SHLD.shape[1]
    if window is None:
        return F.scaled_dot_product_attention(
            q_SHLD, k_SHLD, v_SHLD, dropout_p=how.dropout, is_causal=how.causal, scale=how.scaling, enable_gqa=gqa
        )
    out = []
    # A window's worth of queries reads at most two windows of keys: memory and time stay linear in the length.
    for start in range(0, length, window):
        stop, first = min(start + window, length), max(0, start - window + 1)
        out.append(
            F.scaled_dot_product_attention(
                q_SHLD[:, :, start:stop],
                k_SHLD[:, :, first:stop],
                v_SHLD[:, :, first:stop],
                attn_mask=segments.band(stop - start, stop - first, window),
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
