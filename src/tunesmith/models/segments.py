"""Where the pieces of a ragged pass stand, and which keys each of them reads; made once a pass, used by every layer.

A piece is a row, or where rows begin with the same tokens, their beginning or what is left of one of them: see
`data.sharing`. A piece reads its prefix, which another piece computes, and itself.
"""

# T tokens, K keys of all pieces one after the other, C pieces that share a prefix, P its tokens, Q queries, G groups of
# heads that share keys, D head size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.types import Piece


@dataclass(frozen=True, slots=True)
class Segments:
    """The pieces of one ragged batch, in the order they stand."""

    sizes: tuple[tuple[int, int], ...]
    """(queries, keys) of each."""
    device: torch.device
    query_starts: Tensor | None = None
    """int32 [pieces + 1], where each begins and the last ends; on CUDA only, for the varlen kernel."""
    key_starts: Tensor | None = None
    shared: Shared | None = None
    """None: no piece has a prefix, so keys are read where they stand."""
    bands: dict[tuple[int, int, int], Tensor] = field(default_factory=dict, compare=False)
    """Masks of a sliding window, by (Q, K, window)."""
    layouts: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What `grouped` made for these pieces."""

    @classmethod
    def of(cls, lengths: Sequence[int], *, device: torch.device) -> Segments:
        """Whole rows."""
        return cls.sharing([Piece(length) for length in lengths], device=device)

    @classmethod
    def sharing(cls, pieces: Sequence[Piece], *, device: torch.device) -> Segments:
        """Pieces, some of which read a prefix."""
        shared = Shared.of(pieces, device) if any(piece.prefix for piece in pieces) else None
        sizes = [(piece.tokens, piece.keys) for piece in pieces]

        def starts(sizes: Sequence[int]) -> Tensor | None:
            if device.type != "cuda":
                return None
            return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

        queries, keys = zip(*sizes, strict=True)
        return cls(tuple(sizes), device, starts(queries), starts(keys), shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest piece, of queries or keys."""
        return max(map(max, self.sizes))

    def keys(self, tensor_1GTD: Tensor) -> Tensor:
        """[1, G, K, D]: keys or values as the pieces read them, those of a prefix once for each of its readers."""
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
class Shared:
    """Prefixes and their readers."""

    index_K: Tensor
    """Which token each key is."""
    own_T: Tensor
    """Which key each token is, in the piece that computes it."""
    families: tuple[tuple[int, Tensor], ...]
    """Of each prefix its first token, and [C, P] which keys its tokens are in the pieces that read it."""

    @classmethod
    def of(cls, pieces: Sequence[Piece], device: torch.device) -> Shared:
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
    """Tokens as keys. Backward: the gradients of a prefix from all its readers, summed in float32."""

    @staticmethod
    def forward(ctx: Any, flat_TF: Tensor, shared: Shared) -> Tensor:
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
