"""Elementwise functions that a card computes in one kernel each.

    gate           h = act(g) ∘ u
    gate backward  ∂g = act'(g) ∘ u ∘ ∂h,  ∂u = act(g) ∘ ∂h,  and h again
    rotation       [x₁ c₁ - x₂ s₁, x₂ c₂ + x₁ s₂],  x₁ and x₂ the halves of a head

Spelled out they are a handful of kernels, each of which reads and writes whole tensors, and bytes moved are
what such operations cost a card. Here each is an operator, `torch.ops.tunesmith.…`, and the first way that a
probe on the card finds right computes it: the kernel that torch.compile makes of it, Liger's where that is
installed, or the operations one by one. Shazeer 2020, "GLU Variants Improve Transformer", arXiv 2002.05202,
equation 6; Su et al. 2021, "RoFormer", arXiv 2104.09864, equation 34, in halves as Llama has it.
"""

# T tokens, F width of an MLP, B rows, H heads, D head size

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.errors import is_out_of_memory, one_line

Function: TypeAlias = Callable[..., Any]
ROUNDINGS, WIDE_ROUNDINGS = 4, 16
"""Largest error of a way, as a share of the answer's norm, in roundings of its type, or float32 if more."""


@dataclass(frozen=True, slots=True)
class Activation:
    """The activation of a gate: its value, and the gradient before it from that behind it."""

    name: str
    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(name: str, approximate: str) -> Activation:
    backward = partial(torch.ops.aten.gelu_backward, approximate=approximate)
    return Activation(name, partial(F.gelu, approximate=approximate), backward)


ACTIVATIONS = (
    Activation("silu", F.silu, torch.ops.aten.silu_backward),
    _gelu("gelu_tanh", "tanh"),
    _gelu("gelu", "none"),
    Activation("relu", F.relu, partial(torch.ops.aten.threshold_backward, threshold=0)),
)
_BY_NAME = {activation.name: activation for activation in ACTIVATIONS}


def on_card(tensor: Tensor) -> bool:
    return tensor.is_cuda


def gate(g_TF: Tensor, u_TF: Tensor, activation: Activation) -> Tensor:
    """[T, F]: act(g) ∘ u."""
    if on_card(g_TF):
        return torch.ops.tunesmith.gate(g_TF, u_TF, activation.name)  # type: ignore[no-any-return]
    return activation.value(g_TF).mul_(u_TF)


def gate_backward(
    gh_TF: Tensor, g_TF: Tensor, u_TF: Tensor, activation: Activation, *, needs_h: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """h, if it is needed, and the gradients of g and u. Writes into the gradient of h."""
    if on_card(g_TF):
        return torch.ops.tunesmith.gate_backward(gh_TF, g_TF, u_TF, activation.name)  # type: ignore[no-any-return]
    act_TF = activation.value(g_TF)
    h_TF = act_TF * u_TF if needs_h else None
    gu_TF = act_TF.mul_(gh_TF)
    return h_TF, activation.backward(gh_TF.mul_(u_TF), g_TF), gu_TF


def rotated(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """[B, H, T, D]: heads turned by their positions."""
    out: Tensor = _Rotation.apply(x_BHTD, cos_BTD, sin_BTD)  # type: ignore[no-untyped-call]
    return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _turned(x_BHTD, cos_BTD, sin_BTD, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turned(grad, *ctx.saved_tensors, back=True), None, None


def _turned(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, *, back: bool) -> Tensor:
    # Token by token, as the projections wrote it and attention over packed rows reads it.
    out: Tensor = torch.ops.tunesmith.rotate(x_BHTD.transpose(1, 2), cos_BTD, sin_BTD, back)
    return out.transpose(1, 2)


def _gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    return _BY_NAME[act].value(g) * u


def _gate_backward(gh: Tensor, g: Tensor, u: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    value = _BY_NAME[act].value(g)
    return value * u, _BY_NAME[act].backward(gh * u, g), value * gh


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    (x1, x2), (c1, c2), (s1, s2) = (part.chunk(2, -1) for part in (x, cos.unsqueeze(2), sin.unsqueeze(2)))
    halves = (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1) if back else (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    return torch.cat(halves, -1)


def _rotate_whole(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    halves, c, s = (torch.unflatten(part, -1, (2, -1)) for part in (x, cos.unsqueeze(2), sin.unsqueeze(2)))
    other = (halves * s).flip(-2) if back else halves.flip(-2) * s
    is_negative = torch.arange(2, device=x.device).unsqueeze(-1) == int(back)
    turned: Tensor = halves * c + torch.where(is_negative, -other, other)
    return turned.flatten(-2)


def _compiled(plain: Function) -> Function:
    # One process compiles, so that no pool of others is started.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return torch.compile(plain, dynamic=True)


def _liger_gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_forward

    return swiglu_forward(g.contiguous(), u.contiguous())[-1]  # type: ignore[no-any-return]


def _liger_gate_backward(gh: Tensor, g: Tensor, u: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    from liger_kernel.ops.swiglu import swiglu_backward

    # It writes the gradients over g and u, which autograd keeps.
    gg, gu = swiglu_backward(g.clone(), u.clone(), gh.contiguous())
    return _liger_gate(g, u, act), gg, gu


@dataclass(frozen=True, slots=True)
class Operator:
    """An elementwise function."""

    schema: str
    plain: Function
    liger: Function | None = None
    """For SiLU."""
    whole: Function | None = None
    """`plain` written so that a compiler makes one kernel of it; None: `plain` itself is."""


OPERATORS = {
    "gate": Operator("(Tensor g, Tensor u, str act) -> Tensor", _gate, _liger_gate),
    "gate_backward": Operator(
        "(Tensor gh, Tensor g, Tensor u, str act) -> (Tensor, Tensor, Tensor)", _gate_backward, _liger_gate_backward
    ),
    "rotate": Operator("(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _rotate, whole=_rotate_whole),
}


@dataclass(frozen=True, slots=True)
class Way:
    """The way in which a card computes an operator, and why not in the ways before."""

    name: str
    run: Function
    refused: tuple[str, ...] = ()


_CHOSEN: dict[tuple[str, torch.device, torch.dtype, str | bool], Way] = {}


def way_of(name: str, device: torch.device, dtype: torch.dtype, setting: str | bool) -> Way:
    """The first way that gives the answer of the operations one by one in float32, but for rounding; looked for
    in the first call, which is that of the probe of the module."""
    key = name, device, dtype, setting
    if key not in _CHOSEN:
        _CHOSEN[key] = _first_right(*key)
    return _CHOSEN[key]


def _first_right(name: str, device: torch.device, dtype: torch.dtype, setting: str | bool) -> Way:
    operator = OPERATORS[name]
    makers: list[tuple[str, Callable[[], Function]]] = [
        ("compiled", lambda: _compiled(operator.whole or operator.plain))
    ]
    liger = operator.liger
    if liger is not None and setting == "silu" and find_spec("liger_kernel"):
        makers.append(("Liger's", lambda: liger))
    refused: list[str] = []
    for label, make in makers:
        try:
            run = make()
            problem = _problem(run, name, device, dtype, setting)
        except Exception as error:  # of a compiler, of a driver, of a library of another version
            if is_out_of_memory(error):
                raise
            problem = f"{type(error).__name__}: {one_line(error)[:200]}"
        if not problem:
            return Way(label, run, tuple(refused))
        refused.append(f"{label}: {problem}")
    return Way("one by one", operator.plain, tuple(refused))


def _problem(run: Function, name: str, device: torch.device, dtype: torch.dtype, setting: str | bool) -> str:
    """Why a way is wrong; "" if it is not. Tried with two sizes, since the second may be compiled anew."""
    draw = torch.Generator().manual_seed(0)
    tolerance = max(ROUNDINGS * torch.finfo(dtype).eps, WIDE_ROUNDINGS * torch.finfo(torch.float32).eps)
    for tokens in (5, 64):
        shapes = ((1, tokens, 3, 16), *[(1, tokens, 16)] * 2) if name == "rotate" else ((tokens, 48),) * 3
        inputs = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
        inputs = inputs[:2] if name == "gate" else inputs
        expected = OPERATORS[name].plain(*(tensor.float() for tensor in inputs), setting)
        before = [tensor.clone() for tensor in inputs]
        answer = run(*inputs, setting)
        if not all(map(torch.equal, inputs, before)):
            return "it writes into its inputs"
        answers, right = ((x,) if isinstance(x, Tensor) else x for x in (answer, expected))
        for ours, theirs in zip(answers, right, strict=True):
            away = float((ours.float() - theirs).norm() / theirs.norm())
            if not (away <= tolerance and ours.dtype == dtype):
                return f"off by {away:.2g}"
    return ""


def refused_here(device: torch.device, dtype: torch.dtype) -> str:
    """Why operators are computed one by one on a card; "" where they are not, and where none was called."""
    ways = [way for (_, *place, _), way in _CHOSEN.items() if place == [device, dtype]]
    return next(("; ".join(way.refused) for way in ways if way.name == "one by one"), "")


def _run(name: str, *args: Any) -> Any:
    first: Tensor = args[0]
    if first.device.type != "cuda":
        return OPERATORS[name].plain(*args)
    return way_of(name, first.device, first.dtype, args[-1]).run(*args)


_LIBRARY = torch.library.Library("tunesmith", "DEF")  # type: ignore[no-untyped-call]
for _name, _operator in OPERATORS.items():
    _LIBRARY.define(_name + _operator.schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, partial(_run, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"tunesmith::{_name}", _operator.plain, lib=_LIBRARY)
