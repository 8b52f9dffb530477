"""LoRA: the model is frozen, a product of two small matrices is trained beside each linear layer; a head that answers
with classes or numbers is trained whole.

    y = x Wᵀ + b + s (x Aᵀ) Bᵀ,  s = alpha / rank

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

# T tokens, I inputs, O outputs, R rank

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.methods.masters import Masters
from tunesmith.methods.targets import Target, find_targets, not_linear, replace_module
from tunesmith.models.heads import drawn_names, generator, new_head_names
from tunesmith.recipe.knobs import LoraMethod


class LoraLinear(nn.Module):
    """A frozen linear layer (`nn.Linear`, or GPT-2's `Conv1D`, whose weight lies transposed) with a low-rank path."""

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.scale = scale
        self.dropout = dropout
        self.active = True
        """False computes the base layer alone; see `without_adapter`."""
        # A subclass may compute in its own way; then it is asked instead of imitated.
        self._product_is_known = type(base).forward in (nn.Linear.forward, Conv1D.forward)
        num_outputs, num_inputs = self.weight_OI.shape
        like: dict[str, Any] = {"dtype": self.weight_OI.dtype, "device": self.weight_OI.device}
        self.lora_A = nn.Parameter(torch.zeros(rank, num_inputs, **like))
        self.lora_B = nn.Parameter(torch.zeros(num_outputs, rank, **like))

    @property
    def weight(self) -> Tensor:
        """That of the base, for models that look at it: T5 asks for its precision."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def weight_OI(self) -> Tensor:
        return self.weight.t() if isinstance(self.base, Conv1D) else self.weight

    @property
    def bias_O(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O]."""
        if not self.active:
            out: Tensor = self.base(x)
            return out
        if (self.dropout and self.training) or not self._product_is_known:
            return self._forward_by_autograd(x)
        return lora_forward(x, self.weight_OI, self.bias_O, self.lora_A, self.lora_B, scale=self.scale)

    def _forward_by_autograd(self, x: Tensor) -> Tensor:
        # With dropout the two paths see different inputs, so autograd adds their gradients. Dropout draws from torch's
        # own generator, which gradient checkpointing restores before it recomputes.
        low: Tensor = F.linear(F.dropout(x, self.dropout, training=self.training), self.lora_A)
        out: Tensor = self.base(x) + F.linear(low, self.lora_B) * self.scale
        return out

    def delta_OI(self, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        """What the path adds to the weight, float32."""
        return (b_OR.float() @ a_RI.float()).mul_(self.scale)

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scale={self.scale:g}, dropout={self.dropout:g}"


def lora_forward(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float
) -> Tensor:
    """[..., I] → [..., O]; `weight_OI` and `bias_O` are frozen and get no gradient."""
    out: Tensor = _LoraForward.apply(x, weight_OI, bias_O, a_RI, b_OR, scale)  # type: ignore[no-untyped-call]
    return out


def lora_forward_reference(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float
) -> Tensor:
    """The same by plain autograd: slower, and what `lora_forward` is held equal to."""
    return F.linear(x, weight_OI, bias_O) + F.linear(F.linear(x, a_RI), b_OR) * scale


class _LoraForward(torch.autograd.Function):
    """One node for the whole layer: keeps x and x Aᵀ, adds the low-rank path in place, both ways."""

    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        low_TR = x_TI @ a_RI.t()
        y_TO = _product(x_TI, weight_OI, bias_O)
        y_TO.addmm_(low_TR, b_OR.t(), alpha=scale)
        ctx.save_for_backward(x_TI, weight_OI, a_RI, b_OR, low_TR)
        ctx.scale = scale
        ctx.shape = x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None, None]:
        x_TI, weight_OI, a_RI, b_OR, low_TR = ctx.saved_tensors
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        g_TO = g.reshape(-1, g.shape[-1])
        gx = ga_RI = gb_OR = None
        if needs_x or needs_a:
            glow_TR = (g_TO @ b_OR).mul_(ctx.scale)
        if needs_x:
            gx = (g_TO @ weight_OI).addmm_(glow_TR, a_RI).view(ctx.shape)
        if needs_a:
            ga_RI = glow_TR.t() @ x_TI
        if needs_b:
            # Transposed at the end: on CPU the product with R rows is a third faster than the one with R columns.
            gb_OR = (low_TR.t() @ g_TO).mul_(ctx.scale).t()
        return gx, None, None, ga_RI, gb_OR, None


def _product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    # Bit for bit what nn.Linear and Conv1D compute: Conv1D calls addmm with the weight as it lies.
    if bias_O is not None and not weight_OI.is_contiguous():
        return torch.addmm(bias_O, x_TI, weight_OI.t())
    return F.linear(x_TI, weight_OI, bias_O)


class LoraAttachment:
    """The adapters on a model. `trained` alternates `<layer>.lora_A.weight` [R, I], `<layer>.lora_B.weight` [O, R];
    behind them stand the weights of a head, by their own names."""

    method: str = "lora"

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[tuple[Target, LoraLinear]],
        *,
        head: Sequence[str],
        settings: LoraMethod,
    ) -> None:
        self.model = model
        self.head = tuple(head)
        """Weights that are trained whole."""
        self.settings = settings
        self.layers = {target.name: layer for target, layer in layers}
        self._targets = [target for target, _ in layers]
        self._masters = Masters(
            {
                f"{name}.{matrix}.weight": getattr(layer, matrix)
                for name, layer in self.layers.items()
                for matrix in ("lora_A", "lora_B")
            }
            | {name: model.get_parameter(name) for name in self.head},
            free_early=False,
        )
        self.trained: Mapping[str, Tensor] = self._masters.trained
        self.notes: tuple[str, ...] = ()
        """What a person should know about what is not trained."""
        ratio = settings.loraplus_ratio
        self.rate_factors: Mapping[str, float] = (
            {} if ratio == 1 else {name: ratio for name in self.trained if name.endswith(".lora_B.weight")}
        )
        """LoRA+ (Hayou, Ghosh & Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354)."""

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """The float32 A [R, I] and B [O, R] of one layer."""
        return self.trained[f"{name}.lora_A.weight"], self.trained[f"{name}.lora_B.weight"]

    def take_off(self) -> None:
        """Give the model its own layers back; the attachment adapts nothing any more."""
        for target in self._targets:
            replace_module(self.model, target, target.module)
        self.layers = {}
        self._targets = []


def attach(model: nn.Module, settings: LoraMethod, *, seed: int) -> LoraAttachment:
    """Freeze `model` but for its head, and put fresh adapters on it: outputs do not change until the first update,
    since B is zero.

    A is drawn as PEFT draws it, uniform in ±1/√I, from a generator of (seed, layer name): the same whatever else is
    adapted and on every device.

    Raises:
        RecipeError: a target that cannot be adapted, or a model that carries adapters already, or that guesses tokens
            with output layers that are new.
    """
    head = new_head_names(model)
    if drawn := [name for name in drawn_names(model) if name not in head]:
        raise RecipeError(
            f"method.name: lora: {drawn[0]} is new, and beside adapters it would stay the random numbers that it is. "
            "Use method: full, or a model whose masked-language head comes with it."
        )
    targets, left_out = find_targets(model, settings.targets), not_linear(model)
    attachment = wrap(model, targets, head=head, settings=settings)
    if left_out and not {"all-linear", "mlp"}.isdisjoint(settings.targets):
        attachment.notes = (
            f"{len(left_out)} modules such as {left_out[0]} are not linear layers: they have no adapter, stay frozen",
        )
    with torch.no_grad():
        for name in attachment.layers:
            a_RI, _ = attachment.matrices(name)
            bound = 1 / math.sqrt(a_RI.shape[1])
            a_RI.copy_(torch.empty(a_RI.shape).uniform_(-bound, bound, generator=generator(seed, name)))
    attachment.publish()
    return attachment


def wrap(model: nn.Module, targets: Sequence[Target], *, head: Sequence[str], settings: LoraMethod) -> LoraAttachment:
    """Freeze `model` but for the weights of `head`, and put adapters of zeros on `targets`."""
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise RecipeError("method: the model carries adapters already. Merge them or take them off first.")
    model.requires_grad_(False)
    scale = settings.alpha / settings.rank
    layers = []
    for target in targets:
        layer = LoraLinear(target.module, rank=settings.rank, scale=scale, dropout=settings.dropout)
        layer.train(target.module.training)
        replace_module(model, target, layer)
        layers.append((target, layer))
    return LoraAttachment(model, layers, head=head, settings=settings)


@torch.no_grad()
def merge(attachment: LoraAttachment) -> None:
    """Add every adapter to its layer's weight, in float32 and rounded once, and take the adapters off: what is left is
    a plain model with the head that was trained."""
    for name, layer in attachment.layers.items():
        weight_OI = layer.weight_OI
        merged_OI = weight_OI.float().add_(layer.delta_OI(*attachment.matrices(name)))
        weight_OI.copy_(merged_OI)
    attachment.take_off()


@contextmanager
def without_adapter(attachment: LoraAttachment) -> Iterator[None]:
    """The model without its adapters, inside the block; a head stays as it was trained."""
    layers = list(attachment.layers.values())
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True
