"""Attention of short rows by plain batched products, forward and backward in one node of the graph: on CPU in bfloat16
about half the time of torch's own kernel up to some 256 tokens (`python -m benchmarks.attention`).

    P = softmax(Q Kᵀ · scale),  O = P V
    dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - rowsum(P ∘ dO Vᵀ)),  dQ = dS K · scale,  dK = dSᵀ Q · scale

Query heads that share a key head stand below each other, so that a product reads the keys once. Scores are rounded to
the inputs' precision, as in transformers' eager attention; the softmax computes in float32 inside. Sources: Vaswani et
al. 2017, section 3.2.1; Dao et al. 2022, appendix B.2, for the backward.
"""

# H heads, T tokens, D head size, S rows of equal length, L their length, G groups of heads that share keys,
# R query heads a group, N = S × G, Q = R × L queries of a group

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 256
"""Tokens of a row up to which this beats torch's kernel on CPU, in bfloat16."""


def can(query_1HTD: Tensor, value_1HTD: Tensor, *, dropout: float, softcap: float | None) -> bool:
    """Whether this is the faster way: bfloat16 on CPU, equal head sizes, no dropout or cap."""
    return (
        query_1HTD.device.type == "cpu"
        and query_1HTD.dtype == torch.bfloat16
        and query_1HTD.shape[-1] == value_1HTD.shape[-1]
        and not dropout
        and softcap is None
    )


def attend(
    query_1HTD: Tensor,
    key_1HTD: Tensor,
    value_1HTD: Tensor,
    runs: Sequence[tuple[int, int]],
    *,
    causal: bool,
    scaling: float | None,
) -> Tensor:
    """[1, T, H, D]: each row attended to alone. `runs`: neighbours of equal length as (how many, length), T in all."""
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Grouped.apply(query_1HTD, key_1HTD, value_1HTD, runs, causal, scale)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """Keeps for each run its Q, K, V as they were multiplied, and P."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, runs: Sequence[tuple[int, int]], causal: bool, scale: float
    ) -> Tensor:
        num_heads, num_tokens, size = query.shape[1:]
        num_groups = key.shape[1]
        out_1THD = query.new_empty(1, num_tokens, num_heads, size)
        saved, start = [], 0
        for num, length in runs:
            here = slice(start, start + num * length)
            q_NQD, k_NLD, v_NLD = (_stacked(t[0, :, here], num, num_groups) for t in (query, key, value))
            bias_QL = _later(length, q_NQD).repeat(num_heads // num_groups, 1) if causal else q_NQD.new_zeros(())
            p_NQL = torch.softmax(torch.baddbmm(bias_QL, q_NQD, k_NLD.transpose(1, 2), alpha=scale), -1)
            out_1THD[0, here] = _unstacked(torch.bmm(p_NQL, v_NLD), num, num_groups, length)
            saved += [q_NQD, k_NLD, v_NLD, p_NQL]
            start = here.stop
        ctx.save_for_backward(*saved)
        ctx.runs, ctx.scale, ctx.num_groups = runs, scale, num_groups
        return out_1THD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1THD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        num_tokens, num_heads, size = grad_1THD.shape[1:]
        gq_THD = grad_1THD.new_empty(num_tokens, num_heads, size)
        gk_TGD, gv_TGD = (grad_1THD.new_empty(num_tokens, ctx.num_groups, size) for _ in range(2))
        saved, start = ctx.saved_tensors, 0  # asked for once: a recomputed layer gives them once
        for i, (num, length) in enumerate(ctx.runs):
            here = slice(start, start + num * length)
            q_NQD, k_NLD, v_NLD, p_NQL = saved[4 * i : 4 * i + 4]
            g_NQD = _stacked(grad_1THD[0, here].transpose(0, 1), num, ctx.num_groups)
            gv_NLD = torch.bmm(p_NQL.transpose(1, 2), g_NQD)
            gp_NQL = torch.bmm(g_NQD, v_NLD.transpose(1, 2))
            gs_NQL = torch.ops.aten._softmax_backward_data(gp_NQL, p_NQL, -1, p_NQL.dtype)
            gq_NQD = torch.bmm(gs_NQL, k_NLD).mul_(ctx.scale)
            gk_NLD = torch.bmm(gs_NQL.transpose(1, 2), q_NQD).mul_(ctx.scale)
            for whole, part in ((gq_THD, gq_NQD), (gk_TGD, gk_NLD), (gv_TGD, gv_NLD)):
                whole[here] = _unstacked(part, num, ctx.num_groups, length)
            start = here.stop
        gq, gk, gv = (whole.transpose(0, 1)[None] for whole in (gq_THD, gk_TGD, gv_TGD))
        return gq, gk, gv, None, None, None


def _later(length: int, like: Tensor) -> Tensor:
    """[L, L]: -inf where a token would read a later one."""
    return torch.full((length, length), -math.inf, dtype=like.dtype, device=like.device).triu_(1)


def _stacked(part_HTD: Tensor, num: int, num_groups: int) -> Tensor:
    """[H, S × L, D] → [S × G, R × L, D], each group's heads below each other."""
    part_GRSLD = torch.unflatten(torch.unflatten(part_HTD, 1, (num, -1)), 0, (num_groups, -1))
    return part_GRSLD.permute(2, 0, 1, 3, 4).flatten(2, 3).flatten(0, 1).contiguous()


def _unstacked(part_NQD: Tensor, num: int, num_groups: int, length: int) -> Tensor:
    """[S × G, R × L, D] → [S × L, H, D]."""
    part_SGRLD = torch.unflatten(torch.unflatten(part_NQD, 0, (num, num_groups)), 2, (-1, length))
    return part_SGRLD.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
