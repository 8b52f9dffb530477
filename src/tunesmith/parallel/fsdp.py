"""Layers split over the ranks of a group by FSDP2: each rank keeps a piece of every weight of a layer, and has
a layer whole only while it computes it.

Embeddings, the last norm and the head stay whole on every rank, so that whatever reads them need not know.
Source of the scheme: Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277, section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from tunesmith.parallel.world import World

PIECE_ROWS: Sequence[Placement] = (Shard(0),)


def shard_layers(world: World, model: nn.Module, body: nn.Module, layers: Sequence[nn.Module], *, device: str) -> None:
    """Split the weights of `layers`, which lie in `body`, over all ranks; gradients are summed in
    float32, not averaged.

    A layer at a time is whole on the device. Every pass through `body` is then a meeting of all ranks.
    """
    world.mesh = init_device_mesh(torch.device(device).type, (world.size,))
    for layer in layers:
        split: Any = fully_shard(layer, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        split.set_gradient_divide_factor(1.0)
        split.set_force_sum_reduction_for_comms(True)  # gloo knows no other factor
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    fully_shard(body, mesh=world.mesh, ignored_params={p for p in model.parameters() if id(p) not in inside})


def as_whole(tensors: Mapping[str, Tensor], shards: Mapping[str, torch.Size], mesh: Any) -> dict[str, Tensor]:
    """Turn tensors that are pieces into tensors of the whole shape, which `full_tensor` gathers; others stay.

    `shards`: shapes of the whole, by name of a weight; what an optimizer keeps of it is `<weight>/<part>`.
    """
    gathered = dict(tensors)
    for name, tensor in tensors.items():
        shape = _whole_shape(name, tensor, shards)
        if shape is not None:
            stride = torch.empty(shape, device="meta").stride()
            local = tensor.detach()
            gathered[name] = DTensor.from_local(local, mesh, PIECE_ROWS, run_check=False, shape=shape, stride=stride)
    return gathered


def piece_of(name: str, tensor: Tensor, shards: Mapping[str, torch.Size], part: tuple[int, int]) -> Tensor:
    """The piece of a whole tensor that the rank of `part` = (rank, size) keeps; an unsplit one as it is."""
    rank, size = part
    if _whole_shape(name, tensor, shards) is None:
        return tensor
    pieces = tensor.chunk(size)
    return pieces[rank].clone() if rank < len(pieces) else tensor[:0].clone()


def whole_weights(world: World, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model with split layers, on the first rank; others get none, and take part."""
    weights: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        full = weight.full_tensor().cpu() if isinstance(weight, DTensor) else weight
        if world.is_first:
            weights[name] = full
    return weights


def _whole_shape(name: str, tensor: Tensor, shards: Mapping[str, torch.Size]) -> torch.Size | None:
    shape = shards.get(name, shards.get(name.rpartition("/")[0]))
    return shape if shape is not None and tensor.ndim == len(shape) else None
