"""What the matrices of an adapter are before the first update.

Each layer's are drawn on the CPU from (seed, layer name) alone: the same whatever else is adapted and on every device.
"""

# I inputs, O outputs, R rank

from __future__ import annotations

import math

import torch
from torch import Tensor

from tunesmith.errors import RecipeError
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.models.heads import generator
from tunesmith.recipe.methods import Start

_ITERATIONS = 8


@torch.no_grad()
def draw(layer: LoraLinear, init: Start, *, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """float32 A [R, I] and B [O, R] to begin with. Raises RecipeError for a rank that `init` cannot have.

    With `pissa` they are not zero in product, and `layer.start` takes that off again: outputs do not change.
    """
    rank, num_inputs = layer.lora_A.shape
    drawn = generator(seed, name)
    if init == "pissa":
        layer.start = _principal(layer, drawn, name=name)
        return layer.start
    if init == "orthogonal":
        return _orthogonal(rank, num_inputs, layer.lora_B.shape[0], drawn, name=name)
    bound = 1 / math.sqrt(num_inputs)
    return torch.empty(rank, num_inputs).uniform_(-bound, bound, generator=drawn), torch.zeros(layer.lora_B.shape)


def _principal(layer: LoraLinear, drawn: torch.Generator, *, name: str) -> tuple[Tensor, Tensor]:
    """The R largest singular values of the weight and their vectors, so that s B A is the nearest matrix of rank R.

    Meng, Wang & Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation", arXiv 2404.02948, section 3.
    Found by subspace iteration from twice as many random directions (Halko, Martinsson & Tropp, arXiv 0909.4061,
    algorithm 4.4): a full decomposition takes minutes for a small model already.
    """
    rank = layer.lora_A.shape[0]
    weight_OI = layer.weight_OI.float()
    if rank > min(weight_OI.shape):
        raise RecipeError(
            f"method.rank: {rank}: {name} has {min(weight_OI.shape)} singular values, and pissa starts from as many as "
            "the rank. Lower it, or choose another method.init."
        )
    directions = torch.empty(weight_OI.shape[1], min(2 * rank, *weight_OI.shape)).normal_(generator=drawn)
    basis_OK, _ = torch.linalg.qr(weight_OI @ directions.to(weight_OI.device))
    for _ in range(_ITERATIONS):
        basis_IK, _ = torch.linalg.qr(weight_OI.t() @ basis_OK)
        basis_OK, _ = torch.linalg.qr(weight_OI @ basis_IK)
    u_KK, s_K, v_KI = torch.linalg.svd(basis_OK.t() @ weight_OI, full_matrices=False)
    roots_R = (s_K[:rank] / layer.scale).sqrt()
    return v_KI[:rank] * roots_R[:, None], basis_OK @ u_KK[:, :rank] * roots_R


def _orthogonal(
    rank: int, num_inputs: int, num_outputs: int, drawn: torch.Generator, *, name: str
) -> tuple[Tensor, Tensor]:
    """A and B that are not zero, but whose product is: A lies in one half of the rank's directions, B in the other.

    Half the rows of an orthogonal matrix each, and a spread of a tenth, as peft's "orthogonal" has it; see
    https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation.
    """
    if rank % 2:
        raise RecipeError(f"method.rank: {rank}: {name}: half of an orthogonal start's ranks are A's, half B's: even.")

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).normal_(generator=drawn)

    directions_RR, _ = torch.linalg.qr(normal(rank, rank))
    a_RI = (normal(num_inputs, rank // 2) @ directions_RR[0::2]).t() / 10
    b_OR = normal(num_outputs, rank // 2) @ directions_RR[1::2] / 10
    return a_RI.float().contiguous(), b_OR.float()
