"""The update: AdamW, its decay groups, the rate of every step, and clipping. Defined in docs/schedules.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.recipe.knobs import Optim, known
from tunesmith.types import Choice

FUSED_DEVICES = ("cpu", "cuda", "xpu")

_STATE = ("step", "exp_avg", "exp_avg_sq")
_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|shared|relative_attention_bias|(?!embed_out|\w*(proj|mapping))\w*embed\w*)\.weight$"
)


def linear(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1 along a line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """From 1 at progress 0 to 0 at progress 1 along half a cosine (Loshchilov & Hutter, arXiv 1608.03983, eq. 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {"linear": linear, "cosine": cosine, "constant": constant}
"""The share of the peak rate after warm-up; progress runs from 0 at the first step to 1 after the last."""


def warmup_steps(total: int, optim: Optim) -> int:
    """Steps of warm-up: a share of all steps, rounded to the nearest, or the number given."""
    return math.floor((optim.warmup * total if optim.warmup < 1 else optim.warmup) + 0.5)


def rate(step: int, total: int, optim: Optim) -> float:
    """The learning rate of update `step`, counted from 1 to `total`.

    With W warm-up steps: peak · step / W up to step W, then peak · schedule((step - 1 - W) / (total - W)).
    """
    if not 1 <= step <= total:
        raise ValueError(f"step {step} of {total}: steps are counted from 1 to the last")
    warmup, peak = warmup_steps(total, optim), known(optim.lr)
    if step <= warmup:
        return peak * (step / warmup)
    return peak * SCHEDULES[optim.schedule]((step - 1 - warmup) / (total - warmup))


def decays(name: str, tensor: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases (one axis) nor to embeddings (by name)."""
    return tensor.ndim > 1 and not _EMBEDDING.search(name)


def parameter_groups(
    trained: Mapping[str, Tensor], optim: Optim, factors: Mapping[str, float] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """`trained` in groups of one weight decay and one `rate_factor`, by which the rate of every step is multiplied.

    `factors`: of the tensors that have another factor than 1, by name.
    """
    members: dict[tuple[bool, float], list[tuple[str, Tensor]]] = {}
    for name, tensor in trained.items():
        members.setdefault((decays(name, tensor), factors.get(name, 1.0)), []).append((name, tensor))
    return [
        {
            "params": members[decay, factor],
            "weight_decay": optim.weight_decay if decay else 0.0,
            "lr": known(optim.lr) * factor,
            "rate_factor": factor,
        }
        for decay, factor in sorted(members, key=lambda key: (not key[0], key[1]))
    ]


def adamw(
    trained: Mapping[str, Tensor], optim: Optim, *, factors: Mapping[str, float] = MappingProxyType({})
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) over `trained`; the loop sets the rate of every step."""
    fused = bool(kernel(trained).value == "fused")
    groups = parameter_groups(trained, optim, factors)
    return torch.optim.AdamW(groups, lr=known(optim.lr), betas=optim.betas, eps=optim.eps, fused=fused)


def kernel(trained: Mapping[str, Tensor]) -> Choice:
    """How the update is computed on this device."""
    device = next(iter(trained.values())).device.type
    if device in FUSED_DEVICES:
        return Choice("optim.kernel", "fused", f"one kernel updates all tensors on {device}")
    return Choice("optim.kernel", "plain", f"{device}: the fused kernel is not used there, updates are slower")


@torch.no_grad()
def clip_(tensors: Iterable[Tensor], max_norm: float | None) -> float:
    """Scale gradients so that their global 2-norm is at most `max_norm`; the norm before, float32.

    Gradients are left as they are when `max_norm` is None or the norm is not finite, which the caller must look at.
    """
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.nn.utils.get_total_norm(grads))
    if max_norm is not None and math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def optimizer_tensors(optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state as `<name of the trained tensor>/<exp_avg | exp_avg_sq | step>`, not copied.

    Empty before the first update; a tensor that never had a gradient has no entries.
    """
    return {
        f"{name}/{key}": optimizer.state[tensor][key]
        for name, tensor in trained.items()
        if tensor in optimizer.state
        for key in _STATE
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit.

    Raises:
        CheckpointError: a name that is unknown or misses a part, or a shape that does not fit; nothing was changed.
    """
    state: dict[Tensor, dict[str, Tensor]] = {}
    left = dict(tensors)
    fused = bool(optimizer.defaults.get("fused"))
    for name, tensor in trained.items():
        parts = {key: left.pop(f"{name}/{key}") for key in _STATE if f"{name}/{key}" in left}
        if not parts:
            continue
        shapes = {"step": torch.Size(), "exp_avg": tensor.shape, "exp_avg_sq": tensor.shape}
        for key in _STATE:
            if key not in parts:
                raise CheckpointError(f"optimizer state: {name}/{key} is missing")
            if parts[key].shape != shapes[key]:
                raise CheckpointError(
                    f"optimizer state: {name}/{key} has shape {tuple(parts[key].shape)}, expected {tuple(shapes[key])}"
                )
        # The plain kernel counts steps on the CPU, the fused one beside the tensor.
        places = {key: tensor.device if fused or key != "step" else torch.device("cpu") for key in _STATE}
        state[tensor] = {key: part.detach().clone().to(places[key]) for key, part in parts.items()}
    if left:
        raise CheckpointError(f"optimizer state: nothing trained has the name {min(left)} ({len(left)} in all)")
    optimizer.state.clear()
    optimizer.state.update(state)
