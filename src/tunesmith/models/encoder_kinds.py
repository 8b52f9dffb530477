"""Which layers of encoders are computed as one node of the graph, `encoder_layer`: those of BERT and whatever has its
layers, and of DistilBERT.

What is not known stays as the model has it, and is asked at every call, so layers may change: other parts of a layer,
adapters, hooks, padded batches, long rows, another precision. A class of layers is replaced only where the node gives
its own answer and gradients.
"""

# T tokens, H hidden size

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.models import grouped
from tunesmith.models.activations import ACTIVATIONS, Activation
from tunesmith.models.attention import NAME, ragged_pass, trace_call
from tunesmith.models.encoder_layer import How, Packed, encoder_layer
from tunesmith.models.segments import Segments

PROBE_ROWS = (3, 2)
TOLERANCE = 1e-9
NO_DROPOUT = nn.Dropout(0.0)
IRRELEVANT = ("position_ids",)
"""What layers are handed and do not read: a class that reads it gives another answer, and is not replaced."""


@dataclass(frozen=True, slots=True)
class Names:
    """Where a kind of layer has its parts; "" where it has none."""

    attention: str
    linears: tuple[str, ...]
    """Query, key, value, what follows attention, into the inner width and out of it."""
    norms: tuple[str, str]
    dropouts: tuple[str, str, str]
    """Of attention's weights, behind attention, at the end."""
    activation: str

    def act(self, layer: nn.Module) -> Any:
        """The function of the inner width."""
        return _part(layer, self.activation)


KINDS = (
    Names(
        "attention.self",
        (
            *(f"attention.self.{name}" for name in ("query", "key", "value")),
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        ),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        ("attention.self.dropout", "attention.output.dropout", "output.dropout"),
        "intermediate.intermediate_act_fn",
    ),
    Names(
        "attention",
        (*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
        ("sa_layer_norm", "output_layer_norm"),
        ("attention.dropout", "", "ffn.dropout"),
        "ffn.activation",
    ),
)


def use_fast_layers(model: nn.Module, *, agrees: Agrees | None = None) -> int:
    """Let the layers of an encoder that was given to `attention.use_ragged` be one node each where that is the same;
    how many there are. Weights and names stay.

    `agrees`: asks a model of shapes, which has no answer, another way.
    """
    asked = agrees or _agrees
    known: dict[tuple[type, str], Activation | None] = {}
    replaced = 0
    for module in model.modules():
        names = next((names for names in KINDS if Parts.of(module, names) is not None), None)
        if names is None or "forward" in vars(module):
            continue
        key = type(module), repr(names.act(module))
        if key not in known:
            known[key] = next((act for act in ACTIVATIONS if asked(module, names, act)), None)
        if (activation := known[key]) is not None:
            module.forward = partial(_forward, module, names, activation, module.forward)
            replaced += 1
    return replaced


def _part(module: nn.Module, name: str) -> Any:
    for step in name.split("."):
        found = getattr(module, step, None)
        if found is None:
            return None
        module = found
    return module


@dataclass(frozen=True, slots=True)
class Parts:
    """Of a layer that can be one node now."""

    attention: Any
    linears: list[Any]
    norms: list[Any]
    dropouts: tuple[float, float, float]
    """Probabilities that hold now."""

    @classmethod
    def of(cls, module: nn.Module, names: Names) -> Parts | None:
        """None if it cannot."""
        attention = _part(module, names.attention)
        is_strange = hasattr(module, "crossattention") or getattr(module, "chunk_size_feed_forward", False)
        if attention is None or getattr(attention, "is_causal", True) or is_strange:
            return None
        linears, norms = ([_part(module, name) for name in some] for some in (names.linears, names.norms))
        drops = [_part(module, name) if name else NO_DROPOUT for name in names.dropouts]
        kinds = (*((one, nn.Linear) for one in linears), *((one, nn.LayerNorm) for one in norms))
        if not all(_is_plain(one, kind) and one.bias is not None for one, kind in kinds):
            return None
        if any(type(drop) is not nn.Dropout for drop in drops):
            return None
        at_attention, behind, at_end = (drop.p if drop.training else 0.0 for drop in drops)
        return cls(attention, linears, norms, (at_attention, behind, at_end))


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Of this very class, computing as it does, with nobody listening."""
    if not isinstance(module, kind) or type(module) is not kind or "forward" in vars(module):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _forward(
    module: nn.Module,
    names: Names,
    activation: Activation,
    own: Callable[..., Tensor],
    hidden_states: Tensor,
    *args: Any,
    segments: Segments | None = None,
    **others: Any,
) -> Tensor:
    """[1, T, H] → [1, T, H]; whatever else a layer may be given is the model's own."""
    given = [*args, *(value for name, value in others.items() if name not in IRRELEVANT)]
    if segments is not None and not any(value is not None and value is not False for value in given):
        parts = Parts.of(module, names)
        if parts is not None and _can(parts, hidden_states, segments):
            trace_call(None)
            return _together(parts, activation, hidden_states, segments)
    if segments is not None:
        others["segments"] = segments
    return own(hidden_states, *args, **others)


def _together(parts: Parts, activation: Activation, x: Tensor, segments: Segments) -> Tensor:
    heads = parts.linears[0].out_features // parts.attention.attention_head_size
    how = How(
        Packed.of(segments, heads, like=x),
        parts.attention.scaling,
        parts.dropouts,
        (parts.norms[0].eps, parts.norms[1].eps),
        activation,
    )
    weights = [tensor for layer in (*parts.linears, *parts.norms) for tensor in (layer.weight, layer.bias)]
    return encoder_layer(x, how, weights)


def _can(parts: Parts, x: Tensor, segments: Segments) -> bool:
    dropout = parts.dropouts[0]
    return (
        parts.attention.config._attn_implementation == NAME
        and len(x) == 1
        and segments.shared is None
        and grouped.can(x, x, dropout=dropout, softcap=None)
        and segments.longest <= (grouped.LONGEST_DROPPED if dropout else grouped.LONGEST)
    )


Agrees = Callable[[nn.Module, Names, Activation], bool]


def _agrees(module: nn.Module, names: Names, activation: Activation) -> bool:
    """Result and all gradients of a few random tokens, without dropout, in float64, where rounding hides nothing."""
    twin = copy.deepcopy(module).double().eval()
    parts = Parts.of(twin, names)
    weights = list(twin.parameters())
    segments = Segments.of(PROBE_ROWS, device=weights[0].device)

    def ours(x: Tensor) -> Tensor:
        assert parts is not None, "asked before"
        return _together(parts, activation, x, segments)

    try:
        found, expected = (_answer(way, weights) for way in (ours, partial(twin, segments=segments)))
    except (RuntimeError, TypeError, AttributeError):  # another signature, other shapes, or names
        return False
    # The gradient of the keys' bias is zero but for rounding, which is measured by the largest of all.
    largest = max(float(tensor.norm()) for tensor in expected)
    return all(
        float((a - b).norm()) <= TOLERANCE * (float(b.norm()) + largest) for a, b in zip(found, expected, strict=True)
    )


@torch.enable_grad()
def _answer(layer: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, 1, sum(PROBE_ROWS), weights[0].shape[1], generator=generator).to(weights[0])
    x = drawn[0].requires_grad_()
    for weight in weights:
        weight.requires_grad_()
    with ragged_pass():
        out = layer(x)
    grads = torch.autograd.grad(out, [x, *weights], drawn[1], materialize_grads=True)
    return [tensor.detach() for tensor in (out, *grads)]
