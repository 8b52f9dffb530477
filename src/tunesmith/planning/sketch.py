"""A run's model, method and passes in shapes alone: what is kept in memory throughout, and what one pass adds.

Layers of a stack are alike, so of each kind one is run, and counted as often as it stands there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.data.dataset import RowStore
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.methods import attach
from tunesmith.methods.targets import inner_linears
from tunesmith.models.attention import UnsupportedAttentionError, packed_forward, use_packed_attention
from tunesmith.models.fused_loss import output_layer_of
from tunesmith.models.modes import checkpoint_layers, silence_transformers
from tunesmith.models.packing_check import recurrent_layer
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.size import meta_model
from tunesmith.optim import Optimizer
from tunesmith.planning.tracing import Place, Segment, Tracer
from tunesmith.recipe.methods import PeftMethod, QloraMethod
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import bind
from tunesmith.types import Attachment, Batch, HeadName, Labels, Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that are held from the first step to the last, and how many weights they are."""

    weights: int
    """Of the model as it computes, adapters among them."""
    masters: int
    """float32 copies of what is trained, where it is computed in another type."""
    gradients: int
    """Of a whole step."""
    optimizer: int
    trained_parameters: int


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers that follow each other in one part of a model, each by one that is like it."""

    like: tuple[int, ...]
    """Of each layer of the model, which of the layers that were run stands for it."""


class Sketch:
    """Model and method of a recipe whose every "auto" but those of passes is decided."""

    def __init__(
        self,
        recipe: Recipe,
        located: ModelRef,
        *,
        head: HeadName,
        labels: Labels | None,
        store: RowStore | None = None,
        on: str = "cpu",
    ) -> None:
        """`store`: the rows that are trained on, as `attach` has it. `on`: the kind of device; attention on others than
        processors keeps what torch's own kernel does.

        Raises ModelError where no model can be made from the config alone, and what attaching raises.
        """
        self.mode = FakeTensorMode()
        self._plain = recipe.kernels == "plain" or on != "cpu"
        with _blaming(), self.mode, torch.random.fork_rng(devices=[]), silence_transformers():
            dtype = DTYPES[resolved(recipe.precision)]
            self.model: PreTrainedModel = meta_model(located, dtype=dtype, head=head, labels=labels)
            saved = _packed_away(self.model, recipe.method) if isinstance(recipe.method, QloraMethod) else 0
            self.attachment: Attachment = attach(recipe, self.model, head=head, store=store, pad_id=0)
            knows_output = recipe.kernels == "fast" and not isinstance(recipe.method, PeftMethod)
            output = output_layer_of(self.model) if knows_output else None
            self._loss = bind(resolved(recipe.task), labels, recipe.loss, output)
            kept = _kept(self.model, self.attachment, recipe)
            self.kept = replace(kept, weights=kept.weights - saved)
            self.stacks = _cut(self.model)
        self._own_attention = self.model.config._attn_implementation

    @property
    def num_layers(self) -> int:
        """That can be recomputed."""
        return sum(len(stack.like) for stack in self.stacks)

    def can_pack(self, batch: Batch) -> bool:
        """Whether the model's attention takes rows packed end to end, as far as its code tells."""
        if recurrent_layer(self.model):
            return False
        try:
            with _blaming(), self.mode, torch.no_grad(), self._laid_out(batch.layout), packed_forward() as trace:
                self._loss.measure(self.model, self._of_shapes(batch))
        except UnsupportedAttentionError:
            return False
        return trace.calls > 0 and not trace.local_masks - trace.windows

    def step_pass(self, batch: Batch, *, recompute: bool, accumulating: bool) -> list[Segment]:
        """Forward and backward of one pass. `recompute`: every layer's activations are; `accumulating`: on top of the
        gradients of an earlier pass."""
        with _blaming(), self.mode, self._laid_out(batch.layout), torch.enable_grad():
            checkpoint_layers(self.model, self._num_run if recompute else 0)
            self.model.train()
            if accumulating:
                for tensor in self.attachment.trained.values():
                    tensor.grad = torch.zeros_like(tensor)
            shapes = self._of_shapes(batch)
            with self._marked() as tracer, tracer:
                self._loss.loss_sum(self.model, shapes).backward()  # type: ignore[no-untyped-call]
                self.attachment.collect_gradients()
            segments = tracer.close()
            for tensor in (*self.attachment.trained.values(), *self.model.parameters()):
                tensor.grad = None
        return segments

    def measure_pass(self, batch: Batch) -> list[Segment]:
        """A pass that measures rows."""
        with _blaming(), self.mode, self._laid_out(batch.layout), torch.no_grad():
            self.model.eval()
            shapes = self._of_shapes(batch)
            with self._marked() as tracer, tracer:
                self._loss.measure(self.model, shapes)
            return tracer.close()

    @property
    def _num_run(self) -> int:
        return sum(isinstance(module, GradientCheckpointingLayer) for module in self.model.modules())

    def _of_shapes(self, batch: Batch) -> Batch:
        tensors: dict[str, Any] = {
            field.name: self.mode.from_tensor(value)
            for field in fields(batch)
            if isinstance(value := getattr(batch, field.name), Tensor)
        }
        return replace(batch, **tensors)

    @contextmanager
    def _laid_out(self, layout: Layout) -> Iterator[None]:
        with silence_transformers():
            if layout == "packed":
                use_packed_attention(self.model, plain=self._plain)
            else:
                self.model.set_attn_implementation(self._own_attention)
        yield

    @contextmanager
    def _marked(self) -> Iterator[Tracer]:
        """A tracer that is told of each layer's beginning, and of the end of each stack, both ways."""
        known = (*self.model.parameters(), *self.model.buffers(), *self.attachment.trained.values())
        tensors = list({id(tensor): tensor for tensor in known}.values())
        tracer = Tracer(tensors, gradients=partial(_gradient_bytes, tensors))
        hooks: list[Any] = []
        for number, layers in enumerate(_stacks(self.model)):
            for index, layer in enumerate(layers):
                is_last = index == len(layers) - 1
                hooks += _mark(tracer, layer, number, index, is_last=is_last)
        try:
            yield tracer
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _blaming() -> Iterator[None]:
    """What foreign code says of tensors without numbers becomes a ModelError: it cannot be foreseen, only run."""
    try:
        yield
    except (TunesmithError, UnsupportedAttentionError):
        raise
    except Exception as error:  # whatever a model, or a library's method, does with values that are not there
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"it cannot be run in shapes alone: {type(error).__name__}: {text}") from error


def _mark(tracer: Tracer, layer: nn.Module, stack: int, index: int, *, is_last: bool) -> list[Any]:
    seen: list[bool] = []

    def before(module: nn.Module, args: Any) -> None:
        if not seen:  # not when it is recomputed
            tracer.mark(("forward", stack, index))
            entering = next((value for value in args if isinstance(value, Tensor)), None)
            if index == 0 and entering is not None and entering.requires_grad:
                entering.register_hook(_marking(tracer, ("between", stack, 1)))  # type: ignore[no-untyped-call]

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if seen:
            return
        seen.append(True)
        leaving: Tensor = output if isinstance(output, Tensor) else output[0]
        if is_last:
            tracer.mark(("between", stack, 0))
        if leaving.requires_grad:
            leaving.register_hook(_marking(tracer, ("backward", stack, index)))  # type: ignore[no-untyped-call]

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]


def _marking(tracer: Tracer, place: Place) -> Any:
    def hook(gradient: Tensor) -> None:
        tracer.mark(place)

    return hook


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer)
    ]


def _cut(model: nn.Module) -> list[Stack]:
    """Leave of each stack its first and last layer, and one of each kind between them."""
    trains = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    stacks = []
    for layers in _stacks(model):
        counts = [sum(p.numel() for p in layer.parameters() if id(p) in trains) for layer in layers]
        kinds = [(any(counts[: i + 1]), count) for i, count in enumerate(counts)]
        first_of = {kind: i for i, kind in reversed(list(enumerate(kinds))) if 0 < i < len(layers) - 1}
        kept = sorted({0, len(layers) - 1, *first_of.values()})
        ends = {0: 0, len(layers) - 1: len(layers) - 1}
        stacks.append(Stack(tuple(kept.index(ends.get(i, first_of.get(kind, 0))) for i, kind in enumerate(kinds))))
        layers._modules = {str(n): layers[i] for n, i in enumerate(kept)}
    return stacks


PACKED_BITS = {("nf4", True): 4.127, ("nf4", False): 4.5, ("int8", None): 8.03}
"""Bits of a weight with its scales: 4 and 32 a block of 64; with double quantisation 8 a block, and 32 for 256 blocks
(Dettmers et al. 2023, "QLoRA", section 3); of int8 32 a row, of rows of a thousand."""


def _packed_away(model: nn.Module, method: QloraMethod) -> int:
    """Bytes that a quantised base does not hold: its linear layers are computed here as they are, one is unpacked at
    a time there."""
    weights: list[Tensor] = [target.module.weight for target in inner_linears(model)]  # type: ignore[misc]
    bits = PACKED_BITS[method.quant, method.double_quant]
    saved = sum(weight.nbytes - round(weight.numel() * bits / 8) for weight in weights)
    return saved - max(weight.nbytes for weight in weights)


def _kept(model: nn.Module, attachment: Attachment, recipe: Recipe) -> Kept:
    trained: Mapping[str, Tensor] = attachment.trained
    computing = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    masters = sum(t.nbytes for t in trained.values() if t.untyped_storage()._cdata not in computing)
    weights = sum(t.numel() for t in trained.values())
    return Kept(
        weights=sum(computing.values()),
        masters=masters,
        gradients=4 * weights,
        optimizer=Optimizer(trained, recipe.optim, factors=attachment.rate_factors, seed=recipe.seed).state_bytes(),
        trained_parameters=weights,
    )


def _gradient_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.grad.untyped_storage().nbytes() for tensor in tensors if tensor.grad is not None)
