"""A layer of an encoder in one node of the graph, in place of the sixty operations that models spell it out in.

    a = norm(x + drop(attention(x Wqᵀ + bq, x Wkᵀ + bk, x Wvᵀ + bv) Woᵀ + bo))
    y = norm(a + drop(act(a W₁ᵀ + b₁) W₂ᵀ + b₂))

Devlin et al. 2019, "BERT", arXiv 1810.04805, section 3, which stacks Vaswani et al. 2017, section 3.1; the backward
follows by the chain rule, line by line. Query, key and value are one product, and rows are attended to as `grouped`
does it. What is kept for the backward, numbers a token: x, attention's result, both sums before a norm, the norm
between, two of the inner width, a mask for each dropout, and what attention keeps.
"""

# T tokens, H hidden size, F inner width, D head size, L lines of all blocks

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.models import dropping, grouped
from tunesmith.models.activations import Activation
from tunesmith.models.blocks import Layout
from tunesmith.models.segments import Segments


@dataclass(frozen=True, slots=True)
class Packed:
    """Where queries, keys and values that stand beside each other, token by token, go in the blocks of `grouped`."""

    layout: Layout
    index_L: Tensor
    """Of each line of the blocks, queries before keys before values, which line of [T × 3 × heads, D] it is."""
    place: Tensor
    """Of each of those, where it stands in the blocks: undoes `index_L`."""

    @classmethod
    def of(cls, segments: Segments, heads: int, *, like: Tensor) -> Packed:
        """Made by the first layer that asks for it."""
        name = ("packed", heads, like.dtype)
        if name not in segments.layouts:
            layout = Layout.of(segments.sizes, num_heads=heads, num_groups=heads, causal=False, like=like)
            of_query, of_key = layout.query_index, layout.key_index
            lines = (
                of_query + of_query // heads * 2 * heads,
                *(of_key + of_key // heads * 2 * heads + part * heads for part in (1, 2)),
            )
            first = len(of_query), len(of_query) + len(of_key)
            places = torch.stack([layout.query_place, layout.key_place + first[0], layout.key_place + first[1]])
            place = places.view(3, -1, heads).transpose(0, 1).flatten()
            segments.layouts[name] = cls(layout, torch.cat(lines), place)
        packed: Packed = segments.layouts[name]
        return packed


@dataclass(frozen=True, slots=True)
class How:
    """What a layer computes with beside its weights."""

    packed: Packed
    scale: float
    dropouts: tuple[float, float, float]
    epsilons: tuple[float, float]
    activation: Activation


def encoder_layer(x: Tensor, how: How, weights: Sequence[Tensor]) -> Tensor:
    """[1, T, H] → [1, T, H]. `weights`: matrix and bias of query, key, value, o, 1 and 2, then of both norms."""
    out: Tensor = _Layer.apply(x, how, *weights)  # type: ignore[no-untyped-call]
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: How, *weights: Tensor) -> Tensor:
        wq, bq, wk, bk, wv, bv, wo, bo, w1, b1, w2, b2, na, ba, ny, by = weights
        x_TH, shape_H = x[0], x.shape[2:]
        qkv = F.linear(x_TH, torch.cat([wq, wk, wv]), torch.cat([bq, bk, bv]))
        attended_TH, kept = _attend(qkv, how)
        sum_TH, mask_o = _dropped_onto(x_TH, F.linear(attended_TH, wo, bo), how.dropouts[1])
        a_TH, *stats_a = torch.native_layer_norm(sum_TH, shape_H, na, ba, how.epsilons[0])
        inner_TF = F.linear(a_TH, w1, b1)
        act_TF = how.activation.value(inner_TF)
        end_TH, mask_2 = _dropped_onto(a_TH, F.linear(act_TF, w2, b2), how.dropouts[2])
        y_TH, *stats_y = torch.native_layer_norm(end_TH, shape_H, ny, by, how.epsilons[1])
        states = x_TH, attended_TH, sum_TH, *stats_a, a_TH, inner_TF, act_TF, end_TH, *stats_y
        ctx.save_for_backward(*weights, *states, mask_o, mask_2, *kept)
        ctx.how = how
        return y_TH[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        how: How = ctx.how
        weights, states, (mask_o, mask_2, *kept) = (ctx.saved_tensors[part] for part in PARTS)
        wq, _, wk, _, wv, _, wo, _, w1, _, w2, _, *norms = weights
        x_TH, attended_TH, sum_TH, mean_a, rstd_a, a_TH, inner_TF, act_TF, end_TH, mean_y, rstd_y = states
        needs_x, _, *needs = ctx.needs_input_grad
        g_end, *g_norm_y = _norm_backward(grad[0], end_TH, (mean_y, rstd_y), norms[2:], needs[14:])
        g_2 = _through(g_end, mask_2, how.dropouts[2])
        g_1 = how.activation.backward((g_2 @ w2), inner_TF)
        g_a = (g_1 @ w1).add_(g_end)
        g_sum, *g_norm_a = _norm_backward(g_a, sum_TH, (mean_a, rstd_a), norms[:2], needs[12:14])
        g_o = _through(g_sum, mask_o, how.dropouts[1])
        g_qkv = _attend_backward((g_o @ wo), kept, how)
        g_x = (g_qkv @ torch.cat([wq, wk, wv])).add_(g_sum)[None] if needs_x else None
        found = _three_linears(g_qkv, x_TH, needs[:6])
        for at, (g, read) in enumerate(((g_o, attended_TH), (g_1, a_TH), (g_2, act_TF)), 3):
            found += [g.t() @ read if needs[2 * at] else None, g.sum(0) if needs[2 * at + 1] else None]
        return g_x, None, *found, *g_norm_a, *g_norm_y


PARTS = slice(16), slice(16, 27), slice(27, None)
"""Of what a layer keeps: its weights, states of its tokens, and what may be missing."""


def _three_linears(g_qkv: Tensor, x_TH: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of matrix and bias of query, key and value: parts of one product."""
    matrices = (g_qkv.t() @ x_TH).chunk(3) if any(needs[::2]) else [None] * 3
    biases = g_qkv.sum(0).chunk(3) if any(needs[1::2]) else [None] * 3
    pairs = [grad for pair in zip(matrices, biases, strict=True) for grad in pair]
    return [grad if needed else None for grad, needed in zip(pairs, needs, strict=True)]


def _attend(qkv: Tensor, how: How) -> tuple[Tensor, list[Tensor]]:
    """[T, H], and what the backward needs."""
    packed, layout = how.packed, how.packed.layout
    width = qkv.shape[1] // 3
    size = width * qkv.shape[0] // len(layout.query_place)
    lines = qkv.view(-1, size).index_select(0, packed.index_L).to(layout.dtype)
    q, k, v = _three(lines, layout)
    out, kept = grouped.multiply((q, k, v), layout, scale=how.scale, dropout=how.dropouts[0])
    return out.to(qkv.dtype).index_select(0, layout.query_place).view(-1, width), [lines, *kept]


def _attend_backward(grad_TH: Tensor, kept: list[Tensor], how: How) -> Tensor:
    """[T, 3 H]: gradients of queries, keys and values beside each other."""
    packed, layout = how.packed, how.packed.layout
    lines, *kept = kept
    found = torch.empty_like(lines)
    three, grads = _three(lines, layout), _three(found, layout)
    grad = grad_TH.reshape(-1, lines.shape[1])
    grouped.multiply_backward(grad, three, grads, kept, layout, scale=how.scale, dropout=how.dropouts[0])
    return found.to(grad_TH.dtype).index_select(0, packed.place).view(len(grad_TH), -1)


def _three(lines: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    num_queries, num_keys = len(layout.query_index), len(layout.key_index)
    q, k, v = torch.split(lines, [num_queries, num_keys, num_keys])
    return q, k, v


def _dropped_onto(residual: Tensor, x: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """residual + drop(x), which may lie where x lay, and the mask."""
    if not p:
        return x.add_(residual), None
    mask, share = dropping.kept(x, p)
    return x.mul_(mask).mul_(1 / share).add_(residual), mask


def _through(grad: Tensor, mask: Tensor | None, p: float) -> Tensor:
    return grad if mask is None else (grad * mask).mul_(1 / dropping.share(p))


def _norm_backward(
    grad: Tensor, x: Tensor, stats: tuple[Tensor, Tensor], norm: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of its input, and where needed of its weight and bias."""
    found: tuple[Tensor, Tensor | None, Tensor | None] = torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, x.shape[1:], *stats, *norm, [True, *needs]
    )
    return found
