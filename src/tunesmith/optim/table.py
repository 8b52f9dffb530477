"""Optimizers: one row each, made by the library that keeps it. docs/optimizers.md says when to use which."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.environment import install_command
from tunesmith.errors import RecipeError
from tunesmith.models.quantized import import_bitsandbytes
from tunesmith.recipe.schema import Optim, required, resolved

Groups = list[dict[str, Any]]
FUSED_DEVICES = ("cpu", "cuda", "xpu")
BLOCK = 256
"""Values that share a scale in 8-bit state (bitsandbytes)."""
SMALL = 4096
"""Tensors below this are not worth 8-bit state, as bitsandbytes has it."""

_EMBEDDING = re.compile(
    r"(^|\.)(wte|wpe|shared|relative_attention_bias|(?!embed_out|\w*(proj|mapping))\w*embed\w*)"
    r"(\.modules_to_save(\.\w+)?)?\.weight$"
    r"|\.trainable_tokens_delta(\.\w+)?$"  # rows of new tokens, also of a head, as peft and we name them
)
_INSIDE_A_LAYER = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True, slots=True)
class Slot:
    """One part of the state that an optimizer keeps of one tensor."""

    shape: torch.Size
    dtype: torch.dtype
    place: Literal["beside", "cpu", "number"] = "beside"
    """Beside its tensor, on the CPU, or as a number of Python, which is saved as a tensor."""


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One way to update weights from gradients."""

    name: str
    doc: str
    kernel: Callable[[str], tuple[str, str]]
    """device type → (whose code computes the update, and one sentence on it)."""
    build: Callable[[Groups, Optim], torch.optim.Optimizer]
    state: Callable[[Tensor], Mapping[str, Slot]]
    """What it keeps of a tensor after its first update, by the name that its library gives it."""
    rate: tuple[float, str]
    """Its usual rate as a multiple of AdamW's, and where that is said."""
    takes: Callable[[str, Tensor], bool] = lambda name, tensor: True
    """Whether it updates this tensor; AdamW updates the others."""
    extra: str | None = None
    """The package it comes from, where that is optional."""
    constants: Callable[[Any, Tensor], Mapping[str, Any]] = lambda optimizer, tensor: {}
    """What its state of a tensor holds beside `state`, the same in every run and not saved."""
    spares_zeros: bool = True
    """Whether a row without gradients stays as it is, and the others do as if it were not there."""
    counters: tuple[str, ...] = ()
    """Numbers that it keeps in every parameter group."""
    divides: Callable[[torch.optim.Optimizer], bool] = lambda optimizer: False
    """Whether its kernel divides gradients by `grad_scale`, where a scaler of narrow gradients leaves that."""


def is_embedding(name: str) -> bool:
    """Whether a weight is a table of vectors looked up by number, by its name."""
    return _EMBEDDING.search(name) is not None


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
    return torch.optim.AdamW(groups, lr=resolved(optim.lr), betas=betas, eps=eps, fused=device in FUSED_DEVICES)


def _adamw_kernel(device: str) -> tuple[str, str]:
    if device in FUSED_DEVICES:
        return "fused", f"one kernel updates all tensors on {device}"
    return "plain", f"{device}: the fused kernel is not used there, updates are slower"


def _adamw_state(tensor: Tensor) -> Mapping[str, Slot]:
    # The plain kernel counts steps on the CPU, the fused one beside the tensor.
    place: Literal["beside", "cpu"] = "beside" if tensor.device.type in FUSED_DEVICES else "cpu"
    return {
        "step": Slot(torch.Size(), torch.float32, place),
        "exp_avg": _like(tensor),
        "exp_avg_sq": _like(tensor),
    }


def _adamw_8bit(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    betas, eps = required(optim.betas), required(optim.eps)
    adamw = import_bitsandbytes().optim.AdamW8bit
    return adamw(groups, lr=resolved(optim.lr), betas=betas, eps=eps, min_8bit_size=SMALL)  # type: ignore[no-any-return]


def _adamw_8bit_state(tensor: Tensor) -> Mapping[str, Slot]:
    blocks = Slot(torch.Size([-(-tensor.numel() // BLOCK)]), torch.float32)
    bytes_ = Slot(tensor.shape, torch.uint8)
    number = Slot(torch.Size(), torch.int64, "number")
    return {"step": number, "state1": bytes_, "state2": bytes_, "absmax1": blocks, "absmax2": blocks}


def _adamw_8bit_codes(optimizer: Any, tensor: Tensor) -> Mapping[str, Tensor]:
    """What each of the 256 bytes stands for."""
    signed, unsigned = (optimizer.name2qmap[key].to(tensor.device) for key in ("dynamic", "udynamic"))
    return {"qmap1": signed, "qmap2": unsigned}


def _lion(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    return import_bitsandbytes().optim.Lion32bit(groups, lr=resolved(optim.lr), betas=required(optim.betas))  # type: ignore[no-any-return]


def _adafactor(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    # An update is scaled by max(1, RMS of the weight) and not by the RMS alone: rates mean what they mean elsewhere,
    # and a matrix of zeros, as LoRA's B at its start, can move.
    return torch.optim.Adafactor(groups, lr=resolved(optim.lr), eps=(None, 1.0))


def _adafactor_state(tensor: Tensor) -> Mapping[str, Slot]:
    step = Slot(torch.Size(), torch.float32, "cpu")
    if tensor.ndim < 2:
        return {"step": step, "variance": _like(tensor)}
    *front, rows, columns = tensor.shape
    row_var, col_var = torch.Size([*front, rows, 1]), torch.Size([*front, 1, columns])
    return {"step": step, "row_var": Slot(row_var, torch.float32), "col_var": Slot(col_var, torch.float32)}


def _muon(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    momentum = required(optim.momentum)
    return torch.optim.Muon(groups, lr=resolved(optim.lr), momentum=momentum, adjust_lr_fn="match_rms_adamw")


def _schedule_free(groups: Groups, optim: Optim) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    # One tensor after another: updating all at once holds a second copy of every gradient.
    betas, eps = required(optim.betas), required(optim.eps)
    return AdamWScheduleFree(groups, lr=resolved(optim.lr), betas=betas, eps=eps, foreach=False)  # type: ignore[no-any-return]


def _from(library: str) -> Callable[[str], tuple[str, str]]:
    return lambda device: (library, f"updates are computed by {library} on {device}")


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        name="adamw",
        doc="Adam with decoupled decay: the usual choice.",
        kernel=_adamw_kernel,
        build=_adamw,
        state=_adamw_state,
        rate=(1.0, ""),
        divides=lambda optimizer: bool(optimizer.defaults["fused"]),
    ),
    "adamw_8bit": Optimizer(
        name="adamw_8bit",
        doc="AdamW whose state is kept in 8 bits, a scale for every 256 values.",
        kernel=_from("bitsandbytes"),
        build=_adamw_8bit,
        state=_adamw_8bit_state,
        rate=(1.0, "8-bit AdamW takes AdamW's rate (arXiv 2110.02861)"),
        takes=lambda name, tensor: tensor.numel() >= SMALL and not is_embedding(name),
        extra="bitsandbytes",
        constants=_adamw_8bit_codes,
    ),
    "lion": Optimizer(
        name="lion",
        doc="The sign of a mean of gradients: one number of state a weight.",
        kernel=_from("bitsandbytes"),
        build=_lion,
        state=lambda tensor: {"step": Slot(torch.Size(), torch.int64, "number"), "state1": _like(tensor)},
        rate=(0.2, "Lion takes a third to a tenth of AdamW's rate (arXiv 2302.06675, section 5)"),
        extra="bitsandbytes",
    ),
    "adafactor": Optimizer(
        name="adafactor",
        doc="Means of squares kept as one row and one column a matrix: almost no state, no momentum.",
        kernel=_from("torch"),
        build=_adafactor,
        state=_adafactor_state,
        rate=(1.0, "Adafactor's updates have AdamW's size (arXiv 1804.04235, section 6)"),
        spares_zeros=False,
    ),
    "muon": Optimizer(
        name="muon",
        doc="Momentum made orthogonal for the matrices inside the layers; AdamW for all else.",
        kernel=_from("torch"),
        build=_muon,
        state=lambda tensor: {"momentum_buffer": _like(tensor)},
        rate=(1.0, "Muon's updates are scaled to AdamW's size (arXiv 2502.16982, section 2.2)"),
        takes=lambda name, tensor: tensor.ndim == 2 and bool(_INSIDE_A_LAYER.search(name)) and not is_embedding(name),
    ),
    "schedule_free": Optimizer(
        name="schedule_free",
        doc="AdamW that averages its weights instead of lowering its rate.",
        kernel=_from("schedulefree"),
        build=_schedule_free,
        state=lambda tensor: {"z": _like(tensor), "exp_avg_sq": _like(tensor)},
        rate=(2.0, "schedule-free takes once to ten times AdamW's rate (arXiv 2405.15682)"),
        extra="schedulefree",
        counters=("k", "weight_sum", "lr_max"),
    ),
}
