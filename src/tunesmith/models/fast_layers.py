"""Modules of a model that compute in one node of the graph each, where that is the same.

RMS norms, gated MLPs, linear layers that read the same input, and on a card rotations of queries and keys.
Weights and names stay; a module gets a `forward` of its own. Which modules are known is found by their answers:
a class is taken where a known way gives its own answer and all of its gradients. What is not known stays as it
is: other kinds of layers, dropout, hooks on a layer. This is looked at in every call, since layers may change.
"""

# T tokens, H hidden size

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models.card_kernels import ACTIVATIONS, Activation, on_card, refused_here, rotated
from tunesmith.models.linear_nodes import LinearParts, gated_mlp, linears
from tunesmith.models.rms_norm import COUNTED_FROM, rms_norm

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of layers that read the same input, in the order in which models call them."""
_CROSS = re.compile(r"(?i)(encoder_attn|cross_?att[^.]*)(\.[^.]+)?$")
"""Names of attention whose keys and values read the encoder, and queries the decoder."""
MLP = ("gate_proj", "up_proj", "down_proj")
ROTATION = "apply_rotary_pos_emb"
"""The function that models' attention calls by this name."""
LAYER_PROBE_TOKENS = 4


def use_fast_layers(model: nn.Module) -> list[str]:
    """Replace the forward of every module of the model that is known. Returns a note where a card computes one
    by one what could be one kernel."""
    norms: dict[Any, int | None] = {}
    mlps: dict[Any, Activation | None] = {}
    for name, module in list(model.named_modules()):
        if "forward" in vars(module):
            continue
        if _looks_like_norm(module):
            norm = type(module), _weight(module).dtype
            if norm not in norms:
                norms[norm] = next((start for start in COUNTED_FROM if _norm_agrees(module, start)), None)
            if (start := norms[norm]) is not None:
                module.forward = partial(_norm, module, start, module.forward)
            continue
        if _parts(module, MLP) is not None and not _drops(module):
            mlp = type(module), type(getattr(module, "act_fn", None))
            if mlp not in mlps:
                activation = _activation(module)
                mlps[mlp] = activation if activation is not None and _mlp_agrees(module, activation) else None
            if (activation := mlps[mlp]) is not None:
                module.forward = partial(_gated, module, activation, module.forward)
                continue
        _rotate_by_node(module)
        for names in SIBLINGS:
            parts = _parts(module, names)
            if parts is not None and all(part.rank for part in parts) and not _CROSS.search(name):
                _Siblings([getattr(module, name) for name in names]).join()
    weight = next((p for p in model.parameters() if p.is_floating_point() and on_card(p)), None)
    refused = "" if weight is None else refused_here(weight.device, weight.dtype)
    return [f"gated MLPs and rotations: by several kernels each, slower with the same result ({refused})"] * bool(
        refused
    )


def keeps_less(model: nn.Module) -> bool:
    """Whether the layers of the model, which may be one of shapes, look as if they kept less by these nodes."""
    modules = list(model.modules())
    return any(map(_looks_like_norm, modules)) and any(_parts(module, MLP) is not None for module in modules)


def reads_again(model: nn.Module) -> int:
    """Gated MLPs and layers of one input in one node, which do not keep what a norm of ours answered."""
    nodes = [(names, _parts(module, names)) for module in model.modules() for names in (MLP, *SIBLINGS[:2])]
    return sum(parts is not None and (names is MLP or all(part.rank for part in parts)) for names, parts in nodes)


def parts_of(layer: Any) -> LinearParts | None:
    """The tensors that a linear layer computes with now; None if it may compute with others too."""
    if not isinstance(layer, nn.Module) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    if type(layer) is nn.Linear:
        return LinearParts(layer.weight, layer.bias) if "forward" not in vars(layer) else None
    ask: Callable[[], LinearParts | None] | None = getattr(layer, "parts", None)
    return None if ask is None else ask()


def _parts(module: nn.Module, names: Sequence[str]) -> tuple[LinearParts, ...] | None:
    layers = [parts_of(module._modules.get(name)) for name in names]
    known = tuple(parts for parts in layers if parts is not None)
    return known if len(known) == len(names) else None


class _Siblings:
    """Layers that are called one after the other with the same input: the first computes for all."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.alone: list[Callable[[Tensor], Tensor]] = [layer.forward for layer in layers]
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def join(self) -> None:
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self.forward, index)

    def forward(self, index: int, x: Tensor) -> Tensor:
        """[..., I] → [..., O] of one layer."""
        if index and self.input is x and index in self.waiting:
            out = self.waiting.pop(index)
            if not self.waiting:
                self.input = None
            return out
        # What waits for an input that does not come back, as in a recomputation that is broken off, is let go.
        self.input, self.waiting = None, {}
        if index:
            return self.alone[index](x)
        parts = [parts_of(layer) for layer in self.layers]
        known = [part for part in parts if part is not None and part.rank]
        if len(known) < len(parts):
            return self.alone[index](x)
        first, *others = linears(x, known)
        self.input, self.waiting = x, dict(enumerate(others, 1))
        return first


def _gated(module: nn.Module, activation: Activation, alone: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    parts = _parts(module, MLP)
    if parts is None or more or len(args) != 1:
        return alone(*args, **more)
    gate, up, down = parts
    return gated_mlp(args[0], (gate, up, down), activation)


def _norm(module: nn.Module, start: int, alone: Callable[..., Tensor], *args: Any, **more: Any) -> Tensor:
    weight_H = _weight(module)
    if more or len(args) != 1 or args[0].dtype != weight_H.dtype:
        return alone(*args, **more)
    epsilon = float(getattr(module, "variance_epsilon", getattr(module, "eps", 0.0)))
    return rms_norm(args[0], weight_H, epsilon, start=start)


def _drops(module: nn.Module) -> bool:
    """Whether it has a dropout of its own, which a probe in evaluation mode would not see."""
    return any(
        (isinstance(child, nn.Dropout) and child.p > 0)
        or any("drop" in name and isinstance(value, float) and value > 0 for name, value in vars(child).items())
        for child in (module, *module.children())
        if not hasattr(child, "parts")
    )


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # T5 calls its own a layer norm, which it is but for the mean.
    is_named = type(module).__name__.endswith(("RMSNorm", "T5LayerNorm"))
    return is_named and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # type: ignore[return-value]


def _norm_agrees(module: nn.Module, start: int) -> bool:
    """In float32 too: beside weights of 20 rounding in half precision decides whether they count from 0."""
    for norm in (copy.deepcopy(module).float().requires_grad_(), module):
        weight_H = _weight(norm)
        generator = torch.Generator().manual_seed(0)
        drawn_TH = torch.randn(LAYER_PROBE_TOKENS, len(weight_H), generator=generator).to(weight_H)
        drawn_TH[0] *= 100
        trained = [weight_H] if weight_H.requires_grad else []
        if not _agrees(partial(_norm, norm, start, norm.forward), norm.forward, drawn_TH, trained):
            return False
    return True


def _activation(module: nn.Module) -> Activation | None:
    """The activation of an MLP, found by its values in float32: near 0, where small weights lead, activations
    differ by less than half precision rounds."""
    act: Any = getattr(module, "act_fn", None)
    if not callable(act):
        return None
    grid = torch.linspace(-6, 6, 1000)
    try:
        values = act(grid)
    except (RuntimeError, TypeError):
        return None
    return next((known for known in ACTIVATIONS if torch.allclose(known.value(grid), values, atol=1e-6)), None)


def _rotate_by_node(module: nn.Module) -> None:
    """Let attention turn queries and keys by one node each, on a card, where it does so in halves."""
    forward: Any = type(module).forward
    function: Any = inspect.unwrap(forward)
    # A wrapper that only renames old arguments may be left out; another one may be a layer's own.
    is_plain = function is forward or "/utils/deprecation." in forward.__code__.co_filename.replace("\\", "/")
    theirs = getattr(function, "__globals__", {}).get(ROTATION)
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)  # packed ones are of bytes
    if theirs is None or not is_plain or ROTATION not in function.__code__.co_names or weight is None:
        return
    if on_card(weight) and _rotation_agrees(theirs, weight.device, weight.dtype):
        module.forward = MethodType(_with_rotation(function, theirs), module)


@cache
def _with_rotation(function: FunctionType, theirs: Callable[..., Any]) -> FunctionType:
    """The function, calling ours by the name of theirs."""
    names = {**function.__globals__, ROTATION: partial(_rotate_both, theirs)}
    ours = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    ours.__kwdefaults__ = function.__kwdefaults__
    return ours


def _rotate_both(theirs: Callable[..., Any], q: Tensor, k: Tensor, *turns: Any, **more: Any) -> Any:
    cos, sin = turns if len(turns) == 2 else (None, None)
    if more or cos is None or sin is None or not (on_card(q) and _can_rotate(q, k, cos, sin)):
        return theirs(q, k, *turns, **more)
    return rotated(q, cos, sin), rotated(k, cos, sin)


def _can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        all(x.dim() == 4 and x.shape[2:] == cos.shape[1:] and x.dtype == cos.dtype == sin.dtype for x in (q, k))
        and cos.dim() == 3
        and cos.shape == sin.shape
        and not cos.requires_grad
    )


@cache
def _rotation_agrees(theirs: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    draw = torch.Generator().manual_seed(0)
    q, cos, sin = (torch.randn(shape, generator=draw).to(device, dtype) for shape in ((1, 2, 5, 16), *[(1, 5, 16)] * 2))

    def both(way: Callable[..., Any], x: Tensor) -> Tensor:
        return torch.cat(way(x, x[:, :1], cos, sin), 1)

    return _agrees(partial(both, partial(_rotate_both, theirs)), partial(both, theirs), q, [])


def _mlp_agrees(module: nn.Module, activation: Activation) -> bool:
    parts = _parts(module, MLP)
    assert parts is not None
    gate, up, down = parts
    tensors = [tensor for part in parts for tensor in part.tensors]
    trained = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    like = gate.bias_O if gate.bias_O is not None else next(tensor for tensor in tensors if tensor is not None)
    generator = torch.Generator().manual_seed(0)
    drawn_TH = torch.randn(LAYER_PROBE_TOKENS, _inputs(gate), generator=generator).to(like)
    return _agrees(lambda x: gated_mlp(x, (gate, up, down), activation), module.forward, drawn_TH, trained)


def _inputs(part: LinearParts) -> int:
    return int(part.a_RI.shape[1] if part.a_RI is not None else part.weight.shape[1])  # type: ignore[union-attr]


def _agrees(
    ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor]
) -> bool:
    """Whether both give the same answer and the same gradients, but for rounding."""
    try:
        answers, expected = (_answer(way, x, trained) for way in (ours, theirs))
    except (RuntimeError, TypeError, AttributeError, ValueError):  # other signature or shape, or older torch
        return False
    # Sums over thousands of numbers, rounded in another order; in half precision one rounding of each sum.
    tolerance = max(4 * torch.finfo(x.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    return all(
        mine.shape == its.shape and float((mine - its).norm()) <= tolerance * float(its.norm())
        for mine, its in zip(answers, expected, strict=True)
    )


@torch.enable_grad()
def _answer(way: Callable[[Tensor], Tensor], x: Tensor, trained: Sequence[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = way(x)
    grads = torch.autograd.grad(out, [x, *trained], torch.ones_like(out), materialize_grads=True)
    return [tensor.detach().float() for tensor in (out, *grads)]
