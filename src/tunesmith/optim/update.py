"""One update of everything that is trained: which optimizer takes which tensor, decay, clipping, and state by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.optim.rounding import StandIns
from tunesmith.optim.table import OPTIMIZERS, Groups, Optimizer, Slot, is_embedding
from tunesmith.recipe.schema import Optim, resolved
from tunesmith.types import Choice

NO_FACTORS: Mapping[str, float] = MappingProxyType({})
LARGE = 1 << 16
"""A gradient from which on a call of its own costs nothing: below, torch's norm of many tensors is the faster."""
PIECE = 1 << 20
"""Squares that are added up in float32; those sums in float64."""


def decays(name: str, tensor: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases (one axis) nor to embeddings (by name)."""
    return tensor.ndim > 1 and not is_embedding(name)


@torch.no_grad()
def gradient_norm(tensors: Iterable[Tensor]) -> float:
    """The global 2-norm of the gradients, float32; 0 where there are none.

    Large ones on a processor are multiplied with themselves: torch's own norm reads them half as fast, and of
    28 million numbers it is off by 1e-3.
    """
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    large = [gradient for gradient in gradients if gradient.device.type == "cpu" and gradient.numel() >= LARGE]
    others = [gradient for gradient in gradients if gradient.device.type != "cpu" or gradient.numel() < LARGE]
    squares = [piece.dot(piece) for gradient in large for piece in torch.split(gradient.reshape(-1), PIECE)]
    of_large = float(torch.stack(squares).double().sum().sqrt()) if squares else 0.0
    return math.hypot(of_large, float(torch.nn.utils.get_total_norm(others)) if others else 0.0)


def excess(norm: float, most: float | None) -> float:
    """What gradients of this norm have to be divided by so that it is at most `most`; 1 where it is, or nothing is
    clipped. Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1."""
    return 1.0 if most is None or norm <= most else norm / most


def parameter_groups(trained: Mapping[str, Tensor], optim: Optim, factors: Mapping[str, float] = NO_FACTORS) -> Groups:
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
            "lr": resolved(optim.lr) * factor,
            "rate_factor": factor,
        }
        for decay, factor in sorted(members, key=lambda key: (not key[0], key[1]))
    ]


class Update:
    """The optimizer that the recipe names over the tensors it takes, and AdamW over the others.

    Between two steps the tensors hold the weights that are evaluated and saved. Schedule-free takes its gradients
    elsewhere: `begin` goes there, `step` comes back. What a step does follows from the tensors, the state and the rate;
    of tensors that are bfloat16, which are rounded at random, from `seed` and the number of the step too.
    """

    def __init__(
        self, trained: Mapping[str, Tensor], optim: Optim, *, factors: Mapping[str, float] = NO_FACTORS, seed: int = 0
    ) -> None:
        """Raises RecipeError for an optimizer that counts its calls, over tensors that are updated one by one."""
        self.trained = trained
        self._narrow = StandIns(trained, seed=seed)
        if self._narrow.leaves and OPTIMIZERS[optim.name].counters:
            raise RecipeError(
                f"optim.name: {optim.name}: keeps means of the weights, which bfloat16 alone cannot hold. Use another "
                "optimizer, or method.rounding: nearest."
            )
        self.leaves = {**trained, **self._narrow.leaves}
        """What the optimizers update: `trained`, and float32 stand-ins for what of it is bfloat16."""
        chosen, others = OPTIMIZERS[optim.name], OPTIMIZERS["adamw"]
        shares: dict[str, list[str]] = {chosen.name: [], others.name: []}
        for name, tensor in self.leaves.items():
            shares[chosen.name if chosen.takes(name, tensor) else others.name].append(name)
        self.parts: list[tuple[Optimizer, list[str], torch.optim.Optimizer]] = [
            (row, names, row.build(parameter_groups({n: self.leaves[n] for n in names}, optim, factors), optim))
            for row, names in ((OPTIMIZERS[key], names) for key, names in shares.items())
            if names
        ]

    def begin(self) -> bool:
        """Go where the gradient of the next step is taken; whether the tensors changed, so that they are published."""
        return self._switch("train")

    def step(self, lr: float, *, number: int = 0, divisor: float = 1.0) -> None:
        """Update everything that has a gradient, and drop the gradients. `number`: of the step, for what is drawn.
        `divisor`: of all gradients before, see `excess`."""
        for row, names, optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate_factor"]
            self._divide(row, names, optimizer, divisor)
            if any(name not in self._narrow.leaves for name in names):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for name in names:
                if name in self._narrow.leaves and self.trained[name].grad is not None:
                    with self._narrow.lent(name, number):
                        optimizer.step()
        self._switch("eval")

    @torch.no_grad()
    def _divide(self, row: Optimizer, names: Sequence[str], optimizer: torch.optim.Optimizer, divisor: float) -> None:
        """By the kernel of the update where it can, which spares reading and writing every gradient once more."""
        tensors = [self.trained[name] for name in names if self.trained[name].grad is not None]
        if row.divides(optimizer) and not self._narrow.leaves:
            scale = (
                torch.tensor(divisor, dtype=torch.float32, device=tensors[0].device)
                if divisor != 1 and tensors
                else None
            )
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        elif divisor != 1:
            for tensor in tensors:
                assert tensor.grad is not None, "only those that have one"
                tensor.grad.div_(divisor)

    def rest(self) -> None:
        """Go back to the weights that are evaluated and saved, without an update."""
        self.drop_gradients()
        self._switch("eval")

    def drop_gradients(self) -> None:
        for tensor in self.trained.values():
            tensor.grad = None

    def _switch(self, mode: str) -> bool:
        switches = [getattr(optimizer, mode) for _, _, optimizer in self.parts if hasattr(optimizer, mode)]
        for switch in switches:
            switch()
        return bool(switches)

    def state(self) -> dict[str, Tensor]:
        """Everything kept from step to step, not copied: `<name of the trained tensor>/<part>` and
        `<optimizer>/<number of the group>/<counter>`.

        Empty before the first update; a tensor that never had a gradient has no entries.
        """
        found: dict[str, Tensor] = {}
        for row, names, optimizer in self.parts:
            begun = [name for name in names if optimizer.state.get(self.leaves[name])]
            for name in begun:
                kept, slots = optimizer.state[self.leaves[name]], row.state(self.leaves[name])
                found |= {f"{name}/{key}": _as_tensor(kept[key]) for key in slots}
            if begun:
                found |= {key: _as_tensor(value) for key, value in _counters(row, optimizer).items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, bit for bit.

        Raises:
            CheckpointError: a name that is unknown or misses a part, or a shape that does not fit; nothing was changed.
        """
        left = dict(tensors)
        states: list[dict[Tensor, dict[str, Any]]] = []
        numbers: list[dict[str, Any]] = []
        for row, names, optimizer in self.parts:
            states.append({})
            for name in names:
                tensor = self.leaves[name]
                slots = row.state(tensor)
                parts = {key: left.pop(f"{name}/{key}") for key in slots if f"{name}/{key}" in left}
                if parts:
                    _require_fit(name, parts, slots)
                    placed = {key: _placed(parts[key], slot, tensor) for key, slot in slots.items()}
                    states[-1][tensor] = {**row.constants(optimizer, tensor), **placed}
            wanted = _counters(row, optimizer) if states[-1] else {}
            if missing := sorted(wanted.keys() - left.keys()):
                raise CheckpointError(f"optimizer state: {missing[0]} is missing")
            numbers.append({key: left.pop(key).item() for key in wanted})
        if left:
            raise CheckpointError(f"optimizer state: nothing trained has the name {min(left)} ({len(left)} in all)")
        for (_, _, optimizer), state, counted in zip(self.parts, states, numbers, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)
            for key, value in counted.items():
                _, at, counter = key.split("/")
                optimizer.param_groups[int(at)][counter] = value

    def describe(self) -> Choice:
        """Whose code computes the update, which optimizer takes how much, and what its state weighs."""
        device = next(iter(self.trained.values())).device.type
        row = self.parts[0][0]
        value, reason = row.kernel(device)
        total = sum(tensor.numel() for tensor in self.trained.values())
        shares = [
            f"{part.name} takes {sum(self.trained[name].numel() for name in names) / total:.0%} of the trained weights"
            for part, names, _ in self.parts
        ]
        split = f"; {', '.join(shares)}" if len(shares) > 1 else ""
        return Choice(
            "optim.kernel", value, f"{reason}{split}; {self.state_bytes() / total:.2f} bytes of state a weight"
        )

    def state_bytes(self) -> int:
        """What the state weighs after the first update of every tensor."""
        slots = (
            slot for row, names, _ in self.parts for name in names for slot in row.state(self.trained[name]).values()
        )
        return sum(slot.shape.numel() * slot.dtype.itemsize for slot in slots if slot.place != "number")


def _counters(row: Optimizer, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = enumerate(optimizer.param_groups)
    return {f"{row.name}/{at}/{key}": group[key] for at, group in groups for key in row.counters}


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def _require_fit(name: str, parts: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> None:
    for key, slot in slots.items():
        if key not in parts:
            raise CheckpointError(f"optimizer state: {name}/{key} is missing")
        if parts[key].shape != slot.shape or parts[key].dtype != slot.dtype:
            raise CheckpointError(
                f"optimizer state: {name}/{key} has shape {tuple(parts[key].shape)}, expected {tuple(slot.shape)}"
            )


def _placed(part: Tensor, slot: Slot, tensor: Tensor) -> Any:
    if slot.place == "number":
        return part.item()
    return part.detach().clone().to(tensor.device if slot.place == "beside" else "cpu")
