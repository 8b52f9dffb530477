"""Rows that stand end to end, as blocks of rows of like length, which are multiplied together: see `grouped`."""

# D head size, S rows of a block, G groups of heads that share keys, R query heads a group, L queries of a row,
# Q = R × L, K keys, N = S × G

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WIDE = 32
"""Keys of the longest row of a pass up to which it computes in float32, which is as fast there and compiles nothing:
blocks of short rows have new shapes in every pass. One longer row, and the whole pass computes in its own precision."""
ALIKE, FEW = 0.75, 16
"""Rows share a block if the shortest has this share of the longest's queries, or lacks no more than so many; of its
keys too."""

Row = tuple[int, int]
"""(queries, keys): as many, or keys more, which stand before the queries; where nothing is causal any numbers."""


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
        """`like` has the device of the scores, and their precision, but where all rows of the pass are short."""
        if max(keys for _, keys in rows) <= WIDE:
            like = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
        starts_2S = np.cumsum([(0, 0), *rows[:-1]], axis=0).T
        blocks, queries, keys, filled = [], [], [], []
        for members in _alike(rows, causal=causal):
            own_S, all_S = np.array([rows[i] for i in members]).T
            num_queries, num_keys = int(own_S.max()), int(all_S.max())
            query_SL = _places(starts_2S[0, members], own_S, num_queries)
            key_SK = _places(starts_2S[1, members], all_S, num_keys)
            heads_GR = np.arange(num_heads).reshape(num_groups, -1)
            queries.append((query_SL[:, None, None] * num_heads + heads_GR[:, :, None]).ravel())
            keys.append((key_SK[:, None] * num_groups + np.arange(num_groups)[:, None]).ravel())
            spare_SL = np.arange(num_queries) >= own_S[:, None]
            filled.append(np.repeat(spare_SL, num_heads, axis=0).ravel())
            if causal:
                bias = like.new_full((num_queries, num_keys), -math.inf).triu_(num_keys - num_queries + 1)
                bias = bias.repeat(num_heads // num_groups, 1)
            else:
                spare_SK = np.arange(num_keys) >= all_S[:, None]
                bars_NK = torch.from_numpy(np.repeat(spare_SK, num_groups, axis=0)).to(like.device)
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


def _alike(rows: Sequence[Row], *, causal: bool) -> list[list[int]]:
    """Rows in blocks: of like length on both sides, and where they are causal with as many keys before the queries."""

    def before(i: int) -> int:
        return rows[i][1] - rows[i][0] if causal else 0

    blocks: list[list[int]] = []
    spans: list[Row] = []
    """(fewest, most) queries of each block; most keys has the first row of it."""
    for i in sorted(range(len(rows)), key=lambda i: (before(i), -rows[i][1], -rows[i][0], i)):
        queries, keys = rows[i]
        for at, (members, (fewest, most)) in enumerate(zip(blocks, spans, strict=True)):
            span = min(fewest, queries), max(most, queries)
            is_like = _is_like(*span) and _is_like(keys, rows[members[0]][1])
            if is_like and before(members[0]) == before(i):
                members.append(i)
                spans[at] = span
                break
        else:
            blocks.append([i])
            spans.append((queries, queries))
    return blocks


def _is_like(shorter: int, longer: int) -> bool:
    return shorter >= ALIKE * longer or shorter + FEW >= longer


def _places(starts_S: NDArray[np.int64], lengths_S: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """[S, longest], the last place of a row again and again behind its end."""
    return starts_S[:, None] + np.minimum(np.arange(longest), lengths_S[:, None] - 1)


def _first_places(index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in `index` each number from 0 on stands first."""
    return np.unique(index, return_index=True)[1]
