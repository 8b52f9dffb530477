"""The one meeting of a step: every rank learns what the others computed, and gradients are summed, through flat
pieces of at most 64 MiB."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from tunesmith.errors import GroupError
from tunesmith.parallel.world import World
from tunesmith.types import JsonObject

BUCKET = 16 * 2**20
"""Numbers in a bucket: 64 MiB of float32."""
LARGE = 2**20
"""Numbers from which a float32 piece is summed in place; smaller ones are copied together first."""


@dataclass(frozen=True, slots=True)
class Exhausted:
    """Memory ended in a micro-batch of one row."""

    tokens: int
    peak: int
    """Bytes held at most until then."""
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Computed:
    """Results of a step on one rank, or on all of them."""

    micro_batches: list[tuple[int, ...]]
    """Rows of each micro-batch, in order of ranks."""
    losses: list[float]
    """Loss sum of each micro-batch."""
    targets: float
    """Targets of these micro-batches."""
    computed: int
    """Positions, padding included."""
    peak: int
    tokens_per_pass: int | None = None
    """Smaller than planned, because memory ran out; None: as planned."""
    exhausted: Exhausted | None = None
    row_losses: list[float] = field(default_factory=list)
    """Loss of each row of the micro-batches, summed over its targets; none where the task gives one sum."""
    ungraded: list[int] = field(default_factory=list)
    """Numbers of the trained tensors that got no gradient; filled in by `meet`."""


def meet(world: World, trained: Mapping[str, Tensor], own: Computed, *, num_targets: float) -> Computed:
    """Join what all ranks computed, with the gradients of `trained` summed; a run alone gets `own` back.

    A tensor without a gradient counts as zeros, and stays without one where no rank has one. Where memory ended
    on a rank nothing is summed. Raises GroupError if the targets of all ranks are not the `num_targets` of the
    step.
    """
    if world.size == 1:
        return own
    without = [i for i, tensor in enumerate(trained.values()) if tensor.grad is None]
    mine = {**asdict(own), "ungraded": without, "stop": bool(world.wants_stop())}
    ranks: list[JsonObject] = world.gather_values(mine)
    world.stops = any(rank.pop("stop") for rank in ranks)
    met = _together(ranks)
    if met.exhausted is not None:
        return met
    if not math.isclose(met.targets, num_targets, rel_tol=1e-9):
        raise GroupError(f"{met.targets:,} targets were computed by {world.size} ranks; the step has {num_targets:,}.")
    _sum(world, trained, set(met.ungraded))
    return met


def _together(ranks: list[JsonObject]) -> Computed:
    smaller = [of_rank["tokens_per_pass"] for of_rank in ranks if of_rank["tokens_per_pass"] is not None]
    ended = [
        Exhausted(**{**of_rank["exhausted"], "rank": at}) for at, of_rank in enumerate(ranks) if of_rank["exhausted"]
    ]
    return Computed(
        micro_batches=[tuple(rows) for of_rank in ranks for rows in of_rank["micro_batches"]],
        losses=[loss for of_rank in ranks for loss in of_rank["losses"]],
        row_losses=[loss for of_rank in ranks for loss in of_rank["row_losses"]],
        targets=math.fsum(of_rank["targets"] for of_rank in ranks),
        computed=sum(of_rank["computed"] for of_rank in ranks),
        peak=max(of_rank["peak"] for of_rank in ranks),
        tokens_per_pass=min(smaller, default=None),
        exhausted=ended[0] if ended else None,
        ungraded=sorted(set.intersection(*(set(of_rank["ungraded"]) for of_rank in ranks))),
    )


def _sum(world: World, trained: Mapping[str, Tensor], ungraded: set[int]) -> None:
    gradients = []
    for i, tensor in enumerate(trained.values()):
        if i in ungraded:
            continue
        if tensor.grad is None:
            tensor.grad = tensor.new_zeros(tensor.shape)
        gradients.append(tensor.grad)
    with world.reaching():
        sum_over_ranks(gradients)


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
    summed = tensor.float().contiguous()
    dist.all_reduce(summed)
    tensor.copy_(summed)


def _sum_together(pieces: list[Tensor]) -> None:
    if not pieces:
        return
    bucket = torch.cat([piece.float() for piece in pieces])
    dist.all_reduce(bucket)
    torch._foreach_copy_(pieces, torch.split(bucket, [piece.numel() for piece in pieces]))
