"""Attention of short packed rows by batched matrix products, forward and backward in one autograd node.

On a CPU in bfloat16 it takes a third to five sixths of the time of torch's kernel for rows of up to 512 tokens,
in float32 six to nine tenths up to 96; with dropout, which torch's lacks, it is faster up to 1,024.

    P = softmax(Q Kᵀ · scale),  O = P V
    dV = Pᵀ dO,  dS = P ∘ (dO Vᵀ - rowsum(P ∘ dO Vᵀ)),  dQ = dS K · scale,  dK = dSᵀ Q · scale

With dropout P V becomes (M ∘ P) V / (1 - p), and dO Vᵀ likewise, for a random mask M. Rows of similar length
are multiplied in one block: a shorter row is filled with its last token, whose answers are thrown away and
whose gradients are zero. Query heads that share a key head are stacked, so that a product reads the keys once.
Scores are rounded to the precision of the inputs, as in transformers' eager attention; the softmax computes in
float32. A pass of rows of at most 32 tokens computes in float32 throughout. Sources: Vaswani et al. 2017,
section 3.2.1; Dao et al. 2022, appendix B.2, for the backward.

Kept for the backward, in numbers a token: D for each query head, 2 D for each key head, and one (with dropout
two) for each query head and key.
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

LONGEST = 512
"""Keys of a row up to which this is faster than torch's kernel on a CPU in bfloat16."""
LONGEST_SHARED = 96
"""`LONGEST` in float32 where rows share prefixes; torch's kernel is faster for whole rows."""
LONGEST_DROPPED = 1024
"""`LONGEST` with dropout, in either precision."""
WIDE = 32
"""Keys of the longest row of a pass up to which it computes in float32: as fast there, and oneDNN compiles
nothing for the many shapes of short blocks."""
SIMILAR, FEW = 0.75, 16
"""Rows share a block if the shortest has this share of the longest's queries, or lacks no more than FEW; the
same holds for keys."""
LEVELS = 1 << 16
"""Values of the bits drawn for one element of a dropout mask."""

RowSize = tuple[int, int]
"""(queries, keys). A causal row with more keys than queries reads a prefix: its queries are the last keys."""


def longest(query_1HTD: Tensor, value_1GTD: Tensor, *, dropout: float, softcap: float | None, shared: bool) -> int:
    """Keys of a row up to which this is the faster way; 0: on other devices, in other precisions,
    with unequal head sizes or a softcap. `shared`: rows share prefixes, so that many short
    segments have lengths of their own."""
    if query_1HTD.device.type != "cpu" or query_1HTD.shape[-1] != value_1GTD.shape[-1] or softcap is not None:
        return 0
    usual = {torch.bfloat16: LONGEST, torch.float32: LONGEST_SHARED if shared else 0}.get(query_1HTD.dtype)
    return LONGEST_DROPPED if usual is not None and dropout else usual or 0


def short_row_attention(
    query_1HTD: Tensor,
    key_1GKD: Tensor,
    value_1GKD: Tensor,
    layout: BlockLayout,
    *,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """[1, T, H, D]: attention within each row; `layout` says where rows are among T queries and K keys."""
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _ShortRowAttention.apply(query_1HTD, key_1GKD, value_1GKD, layout, scale, dropout)  # type: ignore[no-untyped-call]
    return out


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """1 where an element is kept and 0 where it is dropped, in the shape and dtype of `like`.

    torch draws one number an element on a CPU, 4.8 ns each; here four share a draw of 64 bits, 0.8 ns each. The
    share that is kept is `kept_share(p)`, p rounded to 16 bits. Source of dropout: Srivastava et al. 2014.
    """
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    bits = draws.view(torch.int16)[: like.numel()].view(like.shape)
    return torch.ge(bits, _dropped_levels(p) - LEVELS // 2, out=torch.empty(like.shape, dtype=like.dtype))


def kept_share(p: float) -> float:
    """The share of elements that `dropout_mask` keeps: dividing by it makes the mean exact."""
    return 1 - _dropped_levels(p) / LEVELS


def _dropped_levels(p: float) -> int:
    return min(max(round(p * LEVELS), 1), LEVELS - 1)


class _ShortRowAttention(torch.autograd.Function):
    """Keeps Q, K and V as they were multiplied, P of each block, and M where there is dropout."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, scale: float, dropout: float
    ) -> Tensor:
        num_heads, num_tokens, size = query.shape[1:]
        q = _lines(query).index_select(0, layout.query_index).to(layout.dtype)
        k, v = (_lines(tensor).index_select(0, layout.key_index).to(layout.dtype) for tensor in (key, value))
        out = torch.empty_like(q)
        wide = torch.promote_types(layout.dtype, torch.float32)  # in which torch's softmax takes half the time
        weights, masks = [], []
        for block, q_NQD, out_NQD, k_NKD, v_NKD in layout.parts((q, out), (k, v)):
            scores_NQK = torch.baddbmm(block.bias, q_NQD, k_NKD.transpose(1, 2), alpha=scale)
            p_NQK = torch.softmax(scores_NQK, -1, dtype=wide).to(layout.dtype)
            weights.append(p_NQK)
            if dropout:
                masks.append(dropout_mask(p_NQK, dropout))
                p_NQK = p_NQK * masks[-1]
            torch.bmm(p_NQK, v_NKD, out=out_NQD)
        if dropout:
            out.mul_(1 / kept_share(dropout))
        ctx.save_for_backward(q, k, v, *weights, *masks)
        ctx.layout, ctx.scale, ctx.dropout = layout, scale, dropout
        ctx.num_heads, ctx.num_groups = num_heads, key.shape[1]
        return out.to(query.dtype).index_select(0, layout.query_place).view(1, num_tokens, num_heads, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1THD: Tensor) -> Any:
        layout: BlockLayout = ctx.layout
        q, k, v, *kept = ctx.saved_tensors
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        weights = kept[: len(layout.blocks)]
        masks: Sequence[Tensor | None] = kept[len(layout.blocks) :] or [None] * len(layout.blocks)
        g = grad_1THD.reshape(-1, grad_1THD.shape[-1]).index_select(0, layout.query_index).to(q.dtype)
        if len(layout.filled):
            g.index_fill_(0, layout.filled, 0)
        if ctx.dropout:
            g.mul_(1 / kept_share(ctx.dropout))
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
        gq.mul_(ctx.scale)
        gk.mul_(ctx.scale)
        places = layout.query_place, layout.key_place, layout.key_place
        heads = ctx.num_heads, ctx.num_groups, ctx.num_groups
        found = [
            lines.index_select(0, place).to(grad_1THD.dtype).view(-1, num, lines.shape[-1]).transpose(0, 1)[None]
            for lines, place, num in zip((gq, gk, gv), places, heads, strict=True)
        ]
        return *found, None, None, None


def _softmax_backward(grad_NQK: Tensor, p_NQK: Tensor) -> Tensor:
    """In float32 where lines are shorter than a vector of bfloat16, whose numbers torch takes one by one."""
    dtype = p_NQK.dtype
    if p_NQK.shape[-1] < WIDE:
        wide = torch.promote_types(dtype, torch.float32)
        grad_NQK, p_NQK = grad_NQK.to(wide), p_NQK.to(wide)
    gradient: Tensor = torch.ops.aten._softmax_backward_data(grad_NQK, p_NQK, -1, p_NQK.dtype)
    return gradient.to(dtype)


def _lines(tensor_1HTD: Tensor) -> Tensor:
    """[T × H, D], a view where the model computes token by token."""
    return tensor_1HTD[0].transpose(0, 1).reshape(-1, tensor_1HTD.shape[-1])


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows that are multiplied together: N products of Q queries with K keys."""

    num: int
    queries: int
    keys: int
    bias: Tensor
    """Added to the scores [N, Q, K]: -inf where a query may not read."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Places of the queries and keys of all rows in blocks, head by head, and back.

    Queries are counted as token · H + head, keys as token · G + group.
    """

    blocks: tuple[RowBlock, ...]
    query_index: Tensor
    query_place: Tensor
    """The inverse of `query_index`: the place in the blocks of each query."""
    key_index: Tensor
    key_place: Tensor
    filled: Tensor
    """Places in the blocks that hold no query."""

    @classmethod
    def of(cls, rows: Sequence[RowSize], *, num_heads: int, num_groups: int, causal: bool, like: Tensor) -> BlockLayout:
        """`like` has the device of the scores, and their precision unless all rows of the pass are short."""
        if max(keys for _, keys in rows) <= WIDE:
            like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        starts_2S = np.cumsum([(0, 0), *rows[:-1]], axis=0).T
        shared = num_heads // num_groups
        heads_GR = np.arange(num_heads).reshape(num_groups, -1)
        blocks, queries, keys, filled = [], [], [], []
        for members in _group_similar(rows, causal=causal):
            own_S, all_S = np.array([rows[i] for i in members]).T
            num_queries, num_keys = int(own_S.max()), int(all_S.max())
            query_SL = _places(starts_2S[0, members], own_S, num_queries)
            key_SK = _places(starts_2S[1, members], all_S, num_keys)
            queries.append((query_SL[:, None, None] * num_heads + heads_GR[:, :, None]).ravel())
            keys.append((key_SK[:, None] * num_groups + np.arange(num_groups)[:, None]).ravel())
            spare_SL = np.arange(num_queries) >= own_S[:, None]
            filled.append(np.repeat(spare_SL, num_heads, axis=0).ravel())
            if causal:
                bias = like.new_full((num_queries, num_keys), -math.inf).triu_(num_keys - num_queries + 1)
                bias = bias.repeat(shared, 1)
            else:
                spare_SK = np.arange(num_keys) >= all_S[:, None]
                bars_NK = torch.from_numpy(np.repeat(spare_SK, num_groups, axis=0)).to(like.device)
                bias = like.new_zeros(bars_NK.shape).masked_fill_(bars_NK, -math.inf)[:, None]
            blocks.append(RowBlock(len(members) * num_groups, shared * num_queries, num_keys, bias))
        index_q, index_k, spare = (np.concatenate(parts) for parts in (queries, keys, filled))
        arrays = (index_q, _first_places(index_q), index_k, _first_places(index_k), np.flatnonzero(spare))
        return cls(tuple(blocks), *(torch.from_numpy(array).to(like.device) for array in arrays))

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the scores and of what is multiplied."""
        return self.blocks[0].bias.dtype

    def parts(self, of_queries: Sequence[Tensor], of_keys: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
        """Each block with its part of every tensor: [N, Q, D] of queries, [N, K, D] of keys."""
        query_parts = [torch.split(lines, [block.num * block.queries for block in self.blocks]) for lines in of_queries]
        key_parts = [torch.split(lines, [block.num * block.keys for block in self.blocks]) for lines in of_keys]
        for i, block in enumerate(self.blocks):
            yield (
                block,
                *(parts[i].view(block.num, block.queries, -1) for parts in query_parts),
                *(parts[i].view(block.num, block.keys, -1) for parts in key_parts),
            )


def _group_similar(rows: Sequence[RowSize], *, causal: bool) -> list[list[int]]:
    """Rows in blocks: similar in both lengths, and if causal with equally many keys before the queries."""

    def before(i: int) -> int:
        return rows[i][1] - rows[i][0] if causal else 0

    blocks: list[list[int]] = []
    spans: list[RowSize] = []
    """(fewest, most) queries of each block; its first row has the most keys."""
    for i in sorted(range(len(rows)), key=lambda i: (before(i), -rows[i][1], -rows[i][0], i)):
        queries, keys = rows[i]
        for at, (members, (fewest, most)) in enumerate(zip(blocks, spans, strict=True)):
            span = min(fewest, queries), max(most, queries)
            similar = _is_similar(*span) and _is_similar(keys, rows[members[0]][1])
            if similar and before(members[0]) == before(i):
                members.append(i)
                spans[at] = span
                break
        else:
            blocks.append([i])
            spans.append((queries, queries))
    return blocks


def _is_similar(shorter: int, longer: int) -> bool:
    return shorter >= SIMILAR * longer or shorter + FEW >= longer


def _places(starts_S: NDArray[np.int64], lengths_S: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """[S, longest], the last place of a row repeated beyond its end."""
    return starts_S[:, None] + np.minimum(np.arange(longest), lengths_S[:, None] - 1)


def _first_places(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first place in `index` of each number from 0 on."""
    return np.unique(index, return_index=True)[1]
