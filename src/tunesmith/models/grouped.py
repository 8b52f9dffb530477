"""Attention of short rows by plain batched products, forward and backward in one node of the graph: on CPU in bfloat16
a third to five sixths of the time of torch's own kernel up to 512 tokens (`python -m benchmarks.attention`).

    P = softmax(Q Kᵀ · scale),  O = P V
    dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - rowsum(P ∘ dO Vᵀ)),  dQ = dS K · scale,  dK = dSᵀ Q · scale

With dropout P V becomes (M ∘ P) V / (1 - p), M drawn anew for each weight by `dropping`, and dO Vᵀ likewise.

Query heads that share a key head stand below each other, so that a product reads the keys once. Rows of like length
are multiplied together: what is missing is filled with the row's last token, whose answers are thrown away and whose
gradients are zero. Scores are rounded to the inputs' precision, as in transformers' eager attention, but in a pass of
short rows alone, which is computed in float32; the softmax computes in float32 inside. Sources: Vaswani et al. 2017,
section 3.2.1; Dao et al. 2022, appendix B.2, for the backward.

Kept for backward, numbers of the precision of the scores a token: D for each query head, 2 D for each key head, and one
for each query head and key, with dropout two; filled ones among them.
"""

# H heads, T tokens, D head size, S rows of a block, G groups of heads that share keys, R query heads a group,
# L queries of a row, Q = R × L, K keys, N = S × G

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models import dropping
from tunesmith.models.blocks import WIDE, Layout

LONGEST = 512
"""Keys of a row up to which this beats torch's kernel on CPU, in bfloat16."""
LONGEST_DROPPED = 1024
"""The same with dropout, which that kernel has not, so that torch takes some twenty operations for it."""


def can(query_1HTD: Tensor, value_1GTD: Tensor, *, dropout: float, softcap: float | None) -> bool:
    """Whether this is the faster way: on CPU, in bfloat16, or with dropout, which torch's kernel leaves to some twenty
    operations a row; equal head sizes, no cap."""
    slow_elsewhere = query_1HTD.dtype == torch.float32 and dropout > 0
    return (
        query_1HTD.device.type == "cpu"
        and (query_1HTD.dtype == torch.bfloat16 or slow_elsewhere)
        and query_1HTD.shape[-1] == value_1GTD.shape[-1]
        and softcap is None
    )


def attend(
    query_1HTD: Tensor,
    key_1GKD: Tensor,
    value_1GKD: Tensor,
    layout: Layout,
    *,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """[1, T, H, D]: each row attended to alone; `layout` says where the rows stand, end to end, T and K in all."""
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    settings = layout, scale, dropout
    out: Tensor = _Grouped.apply(query_1HTD, key_1GKD, value_1GKD, *settings)  # type: ignore[no-untyped-call]
    return out


class _Grouped(torch.autograd.Function):
    """Keeps Q, K, V as they were multiplied, of each block P, and M where there is dropout."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        scale: float,
        dropout: float,
    ) -> Tensor:
        num_heads, num_tokens, size = query.shape[1:]
        q = _lines(query).index_select(0, layout.query_index).to(layout.dtype)
        k, v = (_lines(tensor).index_select(0, layout.key_index).to(layout.dtype) for tensor in (key, value))
        out, kept = multiply((q, k, v), layout, scale=scale, dropout=dropout)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.layout, ctx.scale, ctx.dropout = layout, scale, dropout
        ctx.num_heads, ctx.num_groups = num_heads, key.shape[1]
        return out.to(query.dtype).index_select(0, layout.query_place).view(1, num_tokens, num_heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1THD: Tensor) -> Any:
        layout: Layout = ctx.layout
        q, k, v, *kept = ctx.saved_tensors
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        lines = grad_1THD.reshape(-1, grad_1THD.shape[-1])
        multiply_backward(lines, (q, k, v), grads, kept, layout, scale=ctx.scale, dropout=ctx.dropout)
        places = layout.query_place, layout.key_place, layout.key_place
        gq, gk, gv = (
            grad.index_select(0, place).to(grad_1THD.dtype) for grad, place in zip(grads, places, strict=True)
        )
        heads = ctx.num_heads, ctx.num_groups, ctx.num_groups
        return *(_unlined(grad, num) for grad, num in zip((gq, gk, gv), heads, strict=True)), None, None, None


Three = tuple[Tensor, Tensor, Tensor]
"""Lines of queries, keys and values, or their gradients, as they stand in the blocks."""


def multiply(lines: Three, layout: Layout, *, scale: float, dropout: float) -> tuple[Tensor, list[Tensor]]:
    """O in the lines of the queries, and what its backward needs: of each block P, and with dropout of each M."""
    q, k, v = lines
    out = torch.empty_like(q)
    weights, masks = [], []
    for block, q_NQD, out_NQD, k_NKD, v_NKD in layout.parts((q, out), (k, v)):
        scores_NQK = torch.baddbmm(block.bias, q_NQD, k_NKD.transpose(1, 2), alpha=scale)
        p_NQK = torch.softmax(scores_NQK, -1)
        weights.append(p_NQK)
        if dropout:
            mask_NQK, _ = dropping.kept(p_NQK, dropout)
            masks.append(mask_NQK)
            p_NQK = p_NQK * mask_NQK
        torch.bmm(p_NQK, v_NKD, out=out_NQD)
    if dropout:
        out.mul_(1 / dropping.share(dropout))
    return out, [*weights, *masks]


def multiply_backward(
    grad: Tensor,
    lines: Three,
    grads: Three,
    kept: Sequence[Tensor],
    layout: Layout,
    *,
    scale: float,
    dropout: float,
) -> None:
    """Fills `grads` with those of `lines`; `grad` [T × H, D] is that of each query's
    answer, head by head."""
    q, k, v = lines
    gq, gk, gv = grads
    num = len(layout.blocks)
    weights = kept[:num]
    masks: Sequence[Tensor | None] = kept[num:] or [None] * num
    g = grad.index_select(0, layout.query_index).to(q.dtype)
    if len(layout.filled):
        g.index_fill_(0, layout.filled, 0)
    if dropout:
        g.mul_(1 / dropping.share(dropout))
    for part, p_NQK, m_NQK in zip(layout.parts((q, g, gq), (k, v, gk, gv)), weights, masks, strict=True):
        _, q_NQD, g_NQD, gq_NQD, k_NKD, v_NKD, gk_NKD, gv_NKD = part
        used_NQK = p_NQK if m_NQK is None else p_NQK * m_NQK
        torch.bmm(used_NQK.transpose(1, 2), g_NQD, out=gv_NKD)
        gp_NQK = torch.bmm(g_NQD, v_NKD.transpose(1, 2))
        if m_NQK is not None:
            gp_NQK.mul_(m_NQK)
        gs_NQK = _softmax_backward(gp_NQK, p_NQK)
        torch.bmm(gs_NQK, k_NKD, out=gq_NQD)
        torch.bmm(gs_NQK.transpose(1, 2), q_NQD, out=gk_NKD)
    gq.mul_(scale)
    gk.mul_(scale)


def _softmax_backward(grad_NQK: Tensor, p_NQK: Tensor) -> Tensor:
    """In float32 at least where lines are shorter than a vector of bfloat16, whose numbers torch then takes singly."""
    dtype = p_NQK.dtype
    if p_NQK.shape[-1] < WIDE:
        wide = torch.promote_types(dtype, torch.float32)
        grad_NQK, p_NQK = grad_NQK.to(wide), p_NQK.to(wide)
    found: Tensor = torch.ops.aten._softmax_backward_data(grad_NQK, p_NQK, -1, p_NQK.dtype)
    return found.to(dtype)


def _lines(tensor_1HTD: Tensor) -> Tensor:
    """[T × H, D], a view where the model computes token by token."""
    return tensor_1HTD[0].transpose(0, 1).reshape(-1, tensor_1HTD.shape[-1])


def _unlined(lines: Tensor, num_heads: int) -> Tensor:
    """[T × H, D] → [1, H, T, D]."""
    return lines.view(-1, num_heads, lines.shape[-1]).transpose(0, 1)[None]
