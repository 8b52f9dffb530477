"""Optimizers: add one by writing its row in OPTIMIZERS; the library that keeps it computes the update.

`Optimizer` applies the rows to everything that is trained: who takes which tensor, decay, clipping, and state
by name. docs/reference/optimizers.md says when to use which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tunesmith.environment.packages import import_bitsandbytes, install_command
from tunesmith.errors import CheckpointError, RecipeError
from tunesmith.types import required

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Optim

Groups = list[dict[str, Any]]
FUSED_DEVICES = ("cpu", "cuda", "xpu")
STATE_BLOCK = 256
"""Values that share a scale in 8-bit state (bitsandbytes)."""
SMALL = 4096
"""Tensors below this are not worth 8-bit state, as bitsandbytes has it."""

_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|shared|relative_attention_bias|(?!embed_out|\w*(proj|mapping))\w*embed\w*)"
    r"(\.modules_to_save(\.\w+)?)?\.weight$"
    r"|\.trainable_tokens_delta(\.\w+)?$"  # rows of new tokens, also of a head, as peft and we name them
)
_INSIDE_A_LAYER = re.compile(r"(^|\.)\d+\.")


NO_FACTORS: Mapping[str, float] = MappingProxyType({})
LARGE_TENSOR = 1 << 16
"""Size of a gradient that is worth a call of its own; of many smaller ones torch's norm is faster."""
PIECE = 1 << 20
"""Number of squares that are summed in float32; these sums are summed in float64."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One part of an optimizer's state of one tensor."""

    shape: torch.Size
    dtype: torch.dtype
    place: Literal["device", "cpu", "number"] = "device"
    """On the device of its tensor, on the CPU, or a Python number, which is saved as a tensor."""


@dataclass(frozen=True, slots=True)
class OptimizerRow:
    """One way to update weights from gradients."""

    name: str
    doc: str
    build: Callable[[Groups, Optim], torch.optim.Optimizer]
    state: Callable[[Tensor], Mapping[str, Slot]]
    """The state of a tensor after its first update, by its library's names."""
    rate: tuple[float, str]
    """Its usual rate as a multiple of AdamW's, and the source."""
    takes: Callable[[str, Tensor], bool] = lambda name, tensor: True
    """Whether it updates this tensor; AdamW updates the others."""
    extra: str | None = None
    """The package it comes from, where that is optional."""
    constants: Callable[[Any, Tensor], Mapping[str, Any]] = lambda optimizer, tensor: {}
    """More state of a tensor, the same in every run and not saved."""
    spares_zeros: bool = True
    """Whether rows without gradients stay as they are, and do not change the update of the others."""
    divides: Callable[[torch.optim.Optimizer], bool] = lambda optimizer: False
    """Whether its kernel divides gradients by `grad_scale`."""


def check_installed(optim: Optim) -> None:
    """Raise RecipeError where the optimizer comes from a package that is not installed."""
    extra = OPTIMIZERS[optim.name].extra
    if extra is not None and find_spec(extra) is None:
        raise RecipeError(
            f"optim.name: {optim.name} needs the package {extra}, which is not installed. "
            f"Install it with: {install_command(extra)}, or use optim.name: adamw."
        )


def _like(tensor: Tensor) -> Slot:
    return Slot(tensor.shape, torch.float32)


def _adamw(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    device = groups[0]["params"][0][1].device.type
    betas, eps = required(optim.betas), required(optim.eps)
    return torch.optim.AdamW(groups, lr=float(optim.lr), betas=betas, eps=eps, fused=device in FUSED_DEVICES)


def _adamw_state(tensor: Tensor) -> Mapping[str, Slot]:
    # The plain kernel counts steps on the CPU, the fused one on the device.
    place: Literal["device", "cpu"] = "device" if tensor.device.type in FUSED_DEVICES else "cpu"
    step = Slot(torch.Size(), torch.float32, place)
    return {"step": step, "exp_avg": _like(tensor), "exp_avg_sq": _like(tensor)}


def _adamw_8bit(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    betas, eps = required(optim.betas), required(optim.eps)
    adamw = import_bitsandbytes().optim.AdamW8bit
    return adamw(groups, lr=float(optim.lr), betas=betas, eps=eps, min_8bit_size=SMALL)  # type: ignore[no-any-return]


def _adamw_8bit_state(tensor: Tensor) -> Mapping[str, Slot]:
    blocks = Slot(torch.Size([-(-tensor.numel() // STATE_BLOCK)]), torch.float32)
    bytes_ = Slot(tensor.shape, torch.uint8)
    number = Slot(torch.Size(), torch.int64, "number")
    return {"step": number, "state1": bytes_, "state2": bytes_, "absmax1": blocks, "absmax2": blocks}


def _adamw_8bit_codes(optimizer: Any, tensor: Tensor) -> Mapping[str, Tensor]:
    """The values of the 256 bytes."""
    signed, unsigned = (optimizer.name2qmap[key].to(tensor.device) for key in ("dynamic", "udynamic"))
    return {"qmap1": signed, "qmap2": unsigned}


def _lion(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    return import_bitsandbytes().optim.Lion32bit(groups, lr=float(optim.lr), betas=required(optim.betas))  # type: ignore[no-any-return]


def _adafactor(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    # An update is scaled by max(1, RMS of the weight) and not by the RMS alone: rates mean what they mean
    # elsewhere, and a matrix of zeros, as LoRA's B at its start, can move.
    return torch.optim.Adafactor(groups, lr=float(optim.lr), eps=(None, 1.0))


def _adafactor_state(tensor: Tensor) -> Mapping[str, Slot]:
    step = Slot(torch.Size(), torch.float32, "cpu")
    if tensor.ndim < 2:
        return {"step": step, "variance": _like(tensor)}
    *front, rows, columns = tensor.shape
    row_var, col_var = torch.Size([*front, rows, 1]), torch.Size([*front, 1, columns])
    return {"step": step, "row_var": Slot(row_var, torch.float32), "col_var": Slot(col_var, torch.float32)}


def _muon(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    momentum = required(optim.momentum)
    return torch.optim.Muon(groups, lr=float(optim.lr), momentum=momentum, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(
        name="adamw",
        doc="Adam with decoupled decay: the usual choice.",
        build=_adamw,
        state=_adamw_state,
        rate=(1.0, ""),
        divides=lambda optimizer: bool(optimizer.defaults["fused"]),
    ),
    "adamw_8bit": OptimizerRow(
        name="adamw_8bit",
        doc="AdamW whose state is kept in 8 bits, a scale for every 256 values.",
        build=_adamw_8bit,
        state=_adamw_8bit_state,
        rate=(1.0, "8-bit AdamW takes AdamW's rate (arXiv 2110.02861)"),
        takes=lambda name, tensor: tensor.numel() >= SMALL and not is_embedding(name),
        extra="bitsandbytes",
        constants=_adamw_8bit_codes,
    ),
    "lion": OptimizerRow(
        name="lion",
        doc="The sign of a mean of gradients: one number of state a weight.",
        build=_lion,
        state=lambda tensor: {"step": Slot(torch.Size(), torch.int64, "number"), "state1": _like(tensor)},
        rate=(0.2, "Lion takes a third to a tenth of AdamW's rate (arXiv 2302.06675, section 5)"),
        extra="bitsandbytes",
    ),
    "adafactor": OptimizerRow(
        name="adafactor",
        doc="Means of squares kept as one row and one column a matrix: almost no state, no momentum.",
        build=_adafactor,
        state=_adafactor_state,
        rate=(1.0, "Adafactor's updates have AdamW's size (arXiv 1804.04235, section 6)"),
        spares_zeros=False,
    ),
    "muon": OptimizerRow(
        name="muon",
        doc="Momentum made orthogonal for the matrices inside the layers; AdamW for all else.",
        build=_muon,
        state=lambda tensor: {"momentum_buffer": _like(tensor)},
        rate=(1.0, "Muon's updates are scaled to AdamW's size (arXiv 2502.16982, section 2.2)"),
        takes=lambda name, tensor: tensor.ndim == 2 and bool(_INSIDE_A_LAYER.search(name)) and not is_embedding(name),
    ),
}


def is_embedding(name: str) -> bool:
    """Whether a weight is a table of vectors looked up by number, by its name."""
    return _EMBEDDING.search(name) is not None


def decays(name: str, tensor: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases (one axis) and embeddings (by name)."""
    return tensor.ndim > 1 and not is_embedding(name)


@torch.no_grad()
def gradient_norm(tensors: Iterable[Tensor]) -> float:
    """The global 2-norm of the gradients, float32; 0 where there are none.

    Large ones on a CPU are multiplied with themselves: torch's own norm reads half as fast, and is off by 1e-3
    for 28 million numbers.
    """
    large: list[Tensor] = []
    others: list[Tensor] = []
    for gradient in (tensor.grad for tensor in tensors if tensor.grad is not None):
        is_large = gradient.device.type == "cpu" and gradient.numel() >= LARGE_TENSOR
        (large if is_large else others).append(gradient)
    squares = [piece.dot(piece) for gradient in large for piece in torch.split(gradient.reshape(-1), PIECE)]
    of_large = float(torch.stack(squares).double().sum().sqrt()) if squares else 0.0
    return math.hypot(of_large, float(torch.nn.utils.get_total_norm(others)) if others else 0.0)


def clip_divisor(norm: float, most: float | None) -> float:
    """The divisor of all gradients that brings their norm down to `most`, if any. Pascanu et al. 2013, "On the
    difficulty of training recurrent neural networks", algorithm 1."""
    return 1.0 if most is None or norm <= most else norm / most


def parameter_groups(trained: Mapping[str, Tensor], optim: Optim, factors: Mapping[str, float] = NO_FACTORS) -> Groups:
    """Group tensors by weight decay and `rate_factor`, which multiplies the rate; `factors`: all but 1."""
    members: dict[tuple[bool, float], list[tuple[str, Tensor]]] = {}
    for name, tensor in trained.items():
        members.setdefault((decays(name, tensor), factors.get(name, 1.0)), []).append((name, tensor))
    return [
        {
            "params": members[decay, factor],
            "weight_decay": optim.weight_decay if decay else 0.0,
            "lr": float(optim.lr) * factor,
            "rate_factor": factor,
        }
        for decay, factor in sorted(members, key=lambda key: (not key[0], key[1]))
    ]


class Optimizer:
    """The recipe's optimizer for the tensors that it takes, and AdamW for the others.

    A step follows from tensors, state and rate alone.
    """

    def __init__(
        self, trained: Mapping[str, Tensor], optim: Optim, *, factors: Mapping[str, float] = NO_FACTORS
    ) -> None:
        """`factors`: see `parameter_groups`."""
        self.trained = trained
        chosen, others = OPTIMIZERS[optim.name], OPTIMIZERS["adamw"]
        shares: dict[str, list[str]] = {chosen.name: [], others.name: []}
        for name, tensor in trained.items():
            shares[chosen.name if chosen.takes(name, tensor) else others.name].append(name)
        self.parts: list[tuple[OptimizerRow, list[str], torch.optim.Optimizer]] = [
            (row, names, row.build(parameter_groups({n: trained[n] for n in names}, optim, factors), optim))
            for row, names in ((OPTIMIZERS[key], names) for key, names in shares.items())
            if names
        ]

    def step(self, lr: float, *, divisor: float = 1.0) -> None:
        """Update every tensor that has a gradient, and drop the gradients. `divisor`: divides all gradients
        first, see `clip_divisor`."""
        for row, names, optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate_factor"]
            self._divide(row, names, optimizer, divisor)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _divide(
        self, row: OptimizerRow, names: Sequence[str], optimizer: torch.optim.Optimizer, divisor: float
    ) -> None:
        """Divide inside the update's kernel where it can, which saves a pass over every gradient."""
        tensors = [self.trained[name] for name in names if self.trained[name].grad is not None]
        if row.divides(optimizer):
            divides = divisor != 1 and tensors
            # Filled there: a number that is copied to a CUDA device makes the processor wait for it.
            scale = torch.full((), divisor, dtype=torch.float32, device=tensors[0].device) if divides else None
            optimizer.grad_scale = scale  # type: ignore[attr-defined]
        elif divisor != 1:
            for tensor in tensors:
                assert tensor.grad is not None, "only those that have one"
                tensor.grad.div_(divisor)

    def zero_grad(self) -> None:
        for tensor in self.trained.values():
            tensor.grad = None

    def state(self) -> dict[str, Tensor]:
        """The state, not copied: `<name of a trained tensor>/<part>`. Empty before the first update; a tensor
        that never had a gradient has no entries."""
        tensors: dict[str, Tensor] = {}
        for row, names, optimizer in self.parts:
            for name in names:
                if state := optimizer.state.get(self.trained[name]):
                    tensors |= {f"{name}/{key}": torch.as_tensor(state[key]) for key in row.state(self.trained[name])}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, bit for bit. Raises CheckpointError, with nothing changed, for a name
        that is unknown or misses a part, or a shape that does not fit."""
        left = dict(tensors)
        states: list[dict[Tensor, dict[str, Any]]] = []
        for row, names, optimizer in self.parts:
            states.append({})
            for name in names:
                tensor = self.trained[name]
                slots = row.state(tensor)
                parts = {key: left.pop(f"{name}/{key}") for key in slots if f"{name}/{key}" in left}
                if parts:
                    _require_fit(name, parts, slots)
                    placed = {key: _placed(parts[key], slot, tensor) for key, slot in slots.items()}
                    states[-1][tensor] = {**row.constants(optimizer, tensor), **placed}
        if left:
            raise CheckpointError(f"optimizer state: nothing trained has the name {min(left)} ({len(left)} in all)")
        for (_, _, optimizer), state in zip(self.parts, states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)

    def state_bytes(self) -> int:
        """The size of the state after the first update of every tensor."""
        slots = (
            slot for row, names, _ in self.parts for name in names for slot in row.state(self.trained[name]).values()
        )
        return sum(slot.shape.numel() * slot.dtype.itemsize for slot in slots if slot.place != "number")


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
    return part.detach().clone().to(tensor.device if slot.place == "device" else "cpu")
