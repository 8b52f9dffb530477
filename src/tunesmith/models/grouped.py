"""Attention of short rows by plain batched products, forward and backward in one node of the graph: on CPU in bfloat16
about half the time of torch's own kernel up to some 256 tokens (`python -m benchmarks.attention`).

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

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models import dropping

LONGEST = 256
"""Keys of a row up to which this beats torch's kernel on CPU, in bfloat16."""
WIDE = 32
"""Keys of the longest row of a pass up to which it computes in float32, which is as fast there and compiles nothing:
blocks of short rows have new shapes in every pass. One longer row, and the whole pass computes in its own precision."""
LONGEST_DROPPED = 1024
"""The same with dropout, which that kernel has not, so that torch takes some twenty operations for it."""
ALIKE, FEW = 0.75, 16
"""Rows share a block if the shortest has this share of the longest's queries, or lacks no more than so many."""

Row = tuple[int, int]
"""(queries, keys): as many, or keys more, which stand before the queries."""


def can(query_1HTD: Tensor, value_1HTD: Tensor, *, dropout: float, softcap: float | None) -> bool:
    """Whether this is the faster way: on CPU, in bfloat16, or with dropout, which torch's kernel leaves to some twenty
    operations a row; equal head sizes, no cap."""
    return (
        query_1HTD.device.type == "cpu"
        and (query_1HTD.dtype == torch.bfloat16 or (query_1HTD.dtype == torch.float32 and dropout > 0))
        and query_1HTD.shape[-1] == value_1HTD.shape[-1]
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


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that are multiplied together: N products of Q queries with K keys."""

    num: int
    queries: int
    keys: int
    bias: Tensor
    """Added to the scores [N, Q, K]: -inf where a query may not read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the queries and keys of all rows stand in blocks, head by head, and back.

    Queries are counted as token · H + head, keys as token · G + group.
    """

    blocks: tuple[Block, ...]
    query_index: Tensor
    query_place: Tensor
    """Where in the blocks each query stands: undoes `query_index`."""
    key_index: Tensor
    key_place: Tensor
    filled: Tensor
    """Places of the blocks that hold no query."""

    @classmethod
    def of(cls, rows: Sequence[Row], *, num_heads: int, num_groups: int, causal: bool, like: Tensor) -> Layout:
        """`like` has the device of the scores, and their precision, but where all rows of the pass are short. All rows
        that are not causal have as many keys as queries."""
        if max(keys for _, keys in rows) <= WIDE:
            like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        starts_2S = np.cumsum([(0, 0), *rows[:-1]], axis=0).T
        blocks, queries, keys, filled = [], [], [], []
        for members in _alike(rows):
            own_S, all_S = np.array([rows[i] for i in members]).T
            num_queries, prefix = int(own_S.max()), int(all_S[0] - own_S[0])
            num_keys = prefix + num_queries
            query_SL = _places(starts_2S[0, members], own_S, num_queries)
            key_SK = _places(starts_2S[1, members], all_S, num_keys)
            heads_GR = np.arange(num_heads).reshape(num_groups, -1)
            queries.append((query_SL[:, None, None] * num_heads + heads_GR[:, :, None]).ravel())
            keys.append((key_SK[:, None] * num_groups + np.arange(num_groups)[:, None]).ravel())
            spare_SL = np.arange(num_queries) >= own_S[:, None]
            filled.append(np.repeat(spare_SL, num_heads, axis=0).ravel())
            if causal:
                bias = like.new_full((num_queries, num_keys), -math.inf).triu_(prefix + 1)
                bias = bias.repeat(num_heads // num_groups, 1)
            else:
                bars_NK = torch.from_numpy(np.repeat(spare_SL, num_groups, axis=0)).to(like.device)
                bias = like.new_zeros(bars_NK.shape).masked_fill_(bars_NK, -math.inf)[:, None]
            shared = num_heads // num_groups
            blocks.append(Block(len(members) * num_groups, shared * num_queries, num_keys, bias))
        index_q, index_k, spare = (np.concatenate(parts) for parts in (queries, keys, filled))
        arrays = (index_q, _first_places(index_q), index_k, _first_places(index_k), np.flatnonzero(spare))
        return cls(tuple(blocks), *(torch.from_numpy(array).to(like.device) for array in arrays))

    @property
    def dtype(self) -> torch.dtype:
        """That of the scores, and of what is multiplied."""
        return self.blocks[0].bias.dtype

    def parts(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
        """Of each block the block, and its part of every tensor: [N, Q, D] of queries, [N, K, D] of keys."""
        query, key = 0, 0
        for block in self.blocks:
            num_queries, num_keys = block.num * block.queries, block.num * block.keys
            yield (
                block,
                *(lines[query : query + num_queries].view(block.num, block.queries, -1) for lines in of_queries),
                *(lines[key : key + num_keys].view(block.num, block.keys, -1) for lines in of_keys),
            )
            query, key = query + num_queries, key + num_keys


def _alike(rows: Sequence[Row]) -> list[list[int]]:
    """Rows in blocks: of as many keys before their queries, and of like length."""
    blocks: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: (rows[i][1] - rows[i][0], -rows[i][0], i)):
        num, all_keys = rows[i]
        if blocks:
            longest, longest_keys = rows[blocks[-1][0]]
            if longest_keys - longest == all_keys - num and (num >= ALIKE * longest or num + FEW >= longest):
                blocks[-1].append(i)
                continue
        blocks.append([i])
    return blocks


def _places(starts_S: NDArray[np.int64], lengths_S: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """[S, longest], the last place of a row again and again behind its end."""
    return starts_S[:, None] + np.minimum(np.arange(longest), lengths_S[:, None] - 1)


def _first_places(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in `index` each number from 0 on stands first."""
    return np.unique(index, return_index=True)[1]


class _Grouped(torch.autograd.Function):
    """Keeps Q, K, V as they were multiplied, of each block P, and M where there is dropout."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float
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
    grad: Tensor, lines: Three, grads: Three, kept: Sequence[Tensor], layout: Layout, *, scale: float, dropout: float
) -> None:
    """Fills `grads` with those of `lines`; `grad` [T × H, D] is that of each query's answer, head by head."""
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
