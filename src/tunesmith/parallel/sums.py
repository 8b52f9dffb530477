"""Sums of tensors over a group in place, through flat pieces of at most 64 MiB."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 16 * 2**20
"""Numbers in a bucket: 64 MiB of float32."""
LARGE = 2**20
"""Numbers from which a float32 piece is summed where it lies; smaller ones are copied together first."""


@torch.no_grad()
def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its sum over all ranks, computed in float32; the bits are the same on every rank.

    All ranks pass tensors of the same shapes in the same order.
    """
    small: list[Tensor] = []
    waiting = 0
    for piece in (piece for tensor in tensors for piece in _pieces(tensor)):
        if piece.numel() >= LARGE and piece.dtype == torch.float32:
            dist.all_reduce(piece)
            continue
        if waiting + piece.numel() > BUCKET:
            _sum_together(small)
            small, waiting = [], 0
        small.append(piece)
        waiting += piece.numel()
    _sum_together(small)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of at most a bucket. A tensor that cannot be viewed so is summed here."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), BUCKET)
        return
    whole = tensor.float().contiguous()
    dist.all_reduce(whole)
    tensor.copy_(whole)


def _sum_together(pieces: list[Tensor]) -> None:
    if not pieces:
        return
    bucket = torch.cat([piece.float() for piece in pieces])
    dist.all_reduce(bucket)
    for piece, summed in zip(pieces, torch.split(bucket, [piece.numel() for piece in pieces]), strict=True):
        piece.copy_(summed)
