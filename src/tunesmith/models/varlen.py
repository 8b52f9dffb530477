"""Ragged attention in one call of torch's variable-length flash kernel, on NVIDIA GPUs."""

# T tokens, H heads, D head size

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tunesmith.models.segments import Segments


@cache
def _has_kernel() -> bool:
    # torch 2.10's varlen_attn knows neither windows nor grouped heads: there, segments are attended to one by one.
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


def can(query_1HTD: Tensor, value_1HTD: Tensor, *, causal: bool, dropout: float, softcap: float | None) -> bool:
    """Whether the kernel does this attention: causal, half precision, equal head sizes up to 256, no dropout or cap."""
    return (
        query_1HTD.is_cuda
        and query_1HTD.dtype in (torch.bfloat16, torch.float16)
        and query_1HTD.shape[-1] == value_1HTD.shape[-1] <= 256
        and causal
        and not dropout
        and softcap is None
        and torch.cuda.get_device_capability(query_1HTD.device) >= (8, 0)
        and _has_kernel()
    )


def attend(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    segments: Segments,
    *,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[1, T, H, D]. A window counts the token itself; the kernel's counts those to its left, and 0 to its right.

    Where a piece has more keys than queries, the kernel's last query reads its last key (Dao 2023, FlashAttention-2).
    """
    from torch.nn.attention.varlen import varlen_attn

    q_THD, k_THD, v_THD = (tensor[0].transpose(0, 1) for tensor in (query_1HTD, key_1HTD, value_1HTD))
    assert segments.query_starts is not None  # both are made for every batch on CUDA
    assert segments.key_starts is not None
    out_THD: Tensor = varlen_attn(
        q_THD,
        k_THD,
        v_THD,
        segments.query_starts,
        segments.key_starts,
        max(queries for queries, _ in segments.sizes),
        max(keys for _, keys in segments.sizes),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_THD.shape[1] != k_THD.shape[1],
    )  # type: ignore[assignment]
    return out_THD[None]
