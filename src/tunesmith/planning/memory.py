"""Peak memory by formula. It is an estimate: docs/planning.md says what it counts.

    peak = runtime + weights + masters + optimizer + the largest of what these phases hold besides, + allocator

    step        activations kept + one layer at work + logits in pieces + gradients of the micro-batches before
    update      gradients
    evaluation  one layer at work + logits of held-out targets, in pieces where the loss is

A layer keeps a multiple of the inputs and outputs of its linear layers; a recomputed one keeps its input alone (Chen et
al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.dataset import RowStore
from tunesmith.data.sampler import MicroBatch
from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS, attach
from tunesmith.methods.targets import LINEARS, inner_linears
from tunesmith.models.fused_loss import (
    CHUNK_BYTES,
    CHUNK_BYTES_ELSEWHERE,
    CHUNK_BYTES_TRAINED,
    CHUNK_TARGETS,
    output_layer_of,
)
from tunesmith.models.modes import layers_of, silence_transformers
from tunesmith.models.packing_check import recurrent_layer
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.size import meta_model
from tunesmith.optim import Optimizer
from tunesmith.planning.devices import CUDA_CONTEXT, Device
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.types import HeadName, Labels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AT_WORK = 0.7
"""Memory that the backward of a layer holds besides kept activations, in inputs and outputs of its linear layers."""
LIBRARIES = 48 * 2**20
"""Code of torch, its threads and the model's classes, loaded at first use."""
COMPILED = 650 * 1024
"""Bytes that oneDNN and torch keep of a product in bfloat16, for each of as many shapes as their caches hold."""
BUFFERS = 64 * 2**20
"""Operands of float32 products, copied by the library."""
CUDA_UNUSED = 0.05
"""Share of the tensors' memory that the allocator of a card cannot use."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model with its method attached, in numbers of bytes (what is held throughout) and of features."""

    weights: int
    masters: int
    """float32 copies of what is trained, where it is computed in another type."""
    optimizer: int
    trained_parameters: int
    itemsize: int
    features_L: tuple[int, ...]
    """Inputs and outputs of each layer's linear layers, for one token; of a shared layer once for each use."""
    recomputable: int
    """Layers whose activations can be recomputed, the first ones: all or none."""
    kept: float
    """Times that a layer keeps these for its backward: the method's row says."""
    first: int
    """Index of the first layer with gradients: the layers below keep nothing."""
    linear_weights: int
    """In the layers; those of a shared layer once for each use."""
    trains_linear: float
    """Share of `linear_weights` that is trained."""
    hidden: int
    heads: int
    outputs: int
    """Logits of a target: the vocabulary, or the outputs of a head."""
    trains_output: bool
    fused_loss: bool
    can_pack: bool
    """No layer carries a state from token to token."""
    gathered: int = 0
    """Bytes of layers that are split over devices: a pass brings them together for the forward and for the backward."""
    elsewhere: int = 0
    """Trained weights that other devices keep."""

    @property
    def gradients(self) -> int:
        """Bytes of float32 gradients."""
        return 4 * (self.trained_parameters - self.elsewhere)

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        return 4 * self.trained_parameters + self.optimizer * 4 * self.trained_parameters // max(1, self.gradients)


@dataclass(frozen=True, slots=True)
class Load:
    """Sizes of a micro-batch."""

    tokens: int
    targets: int
    squares: int = 0
    """Sum of the squared lengths of its rows: each head has as many scores."""
    short_squares: int = 0
    """Sum of squares for rows of at most `LONGEST` tokens, whose scores are kept on a processor in bfloat16."""


@dataclass(frozen=True, slots=True)
class Heavy:
    """A micro-batch of one step."""

    step: int
    rows: MicroBatch
    accumulating: bool
    """Whether the step has other micro-batches, so that gradients are there already."""
    load: Load


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for, in the moment of a phase that needs the most."""

    phase: str
    weights: int
    masters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    runtime: int = 0
    """Python, torch, and what they keep for themselves."""
    allocator: int = 0
    """Freed memory that the process does not give back."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Component → bytes."""
        names = ("weights", "masters", "gradients", "optimizer", "activations", "logits", "runtime", "allocator")
        return {name: getattr(self, name) for name in names}


def sizes_of(
    recipe: Recipe, located: ModelRef, *, head: HeadName, labels: Labels | None, store: RowStore | None
) -> tuple[Sizes, nn.Module]:
    """The sizes of a recipe's model, made without weights, and that model.

    Raises ModelError where no model can be made from the config alone, and what attaching the method raises.
    """
    method = METHODS[recipe.method.name]
    with torch.device("meta"), silence_transformers():
        model = meta_model(located, dtype=DTYPES[resolved(recipe.precision)], head=head, labels=labels)
    layers = _stack(model)
    features_L = tuple(_features(layer) for layer in layers)
    saved = _quantized_away(model) if method.quantizes else 0
    linears = _linear_weights(model)
    split = _split_weights(model, recipe)
    with torch.device("meta"):
        attachment = attach(recipe, model, head=head, store=store, pad_id=0)
    computing = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    trained: list[Tensor] = list(attachment.trained.values())
    output = model.get_output_embeddings()
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    below = attachment.trains_token_rows or _learns(model.get_input_embeddings())
    first = 0 if below or not inside else next((i for i, layer in enumerate(layers) if _learns(layer)), len(layers))
    config = model.config.get_text_config()
    linear_weights = sum(weight.numel() for weight in linears)
    state = Optimizer(attachment.trained, recipe.optim, factors=attachment.rate_factors).state_bytes()
    num_trained, gathered = sum(tensor.numel() for tensor in trained), sum(split.values())
    elsewhere = 1 - 1 / resolved(recipe.devices) if split else 0.0
    """Share of what is split that other devices keep."""
    own = num_trained - int(
        elsewhere * sum(attachment.trained[name].numel() for name in split.keys() & attachment.trained.keys())
    )
    largest = sorted((sum(p.nbytes for p in layer.parameters()) for layer in layers_of(model)), reverse=True)[:2]
    at_hand = sum(largest) if split else 0  # a layer that computes, and the next one
    masters = sum(tensor.nbytes for tensor in trained if id(tensor) not in computing)
    return Sizes(
        weights=sum(computing.values()) - saved - int(elsewhere * gathered) + at_hand,
        masters=masters * own // max(1, num_trained),
        optimizer=state * own // max(1, num_trained),
        trained_parameters=num_trained,
        itemsize=model.dtype.itemsize,
        features_L=features_L,
        recomputable=len(layers_of(model)),
        kept=method.kept_activations,
        first=first,
        linear_weights=linear_weights * (len(layers) // max(1, len(set(layers)))),
        trains_linear=sum(weight.numel() for weight in linears if weight.requires_grad) / max(1, linear_weights),
        hidden=int(config.hidden_size),
        heads=int(getattr(config, "num_attention_heads", 1)),
        outputs=labels.num_outputs if labels is not None else 0 if head == "vector" else int(config.vocab_size),
        trains_output=output is not None and any(p.requires_grad for p in output.parameters()),
        fused_loss=recipe.kernels == "fast" and method.fused_loss and output_layer_of(model) is not None,
        can_pack=not recurrent_layer(model),
        gathered=gathered,
        elsewhere=num_trained - own,
    ), model


def layers_to_split(model: nn.Module, recipe: Recipe) -> Sequence[nn.Module]:
    """The layers of a model, each with weights of its own. Raises RecipeError for a model that has none."""
    layers = layers_of(model)
    weights = [id(weight) for layer in layers for weight in layer.parameters()]
    if 0 < len(weights) == len(set(weights)):
        return layers
    why = "its layers share weights" if weights else "it has no list of layers that could be split"
    raise RecipeError(f"shard: true: not with model: {recipe.model}: {why}. Leave shard out.")


def _split_weights(model: PreTrainedModel, recipe: Recipe) -> dict[str, int]:
    """Bytes of each weight, by name, that the recipe splits over its devices: those of the layers."""
    if recipe.shard is not True:
        return {}
    inside = {id(weight) for layer in layers_to_split(model, recipe) for weight in layer.parameters()}
    return {name: weight.nbytes for name, weight in model.named_parameters() if id(weight) in inside}


def phases(sizes: Sizes, heavy: Heavy, look: Load, *, recomputed: int, device: Device) -> list[Memory]:
    """The most that each phase of a run needs; on a processor without what the process held before.

    `look`: the heaviest micro-batch that is measured. `recomputed`: layers whose activations are.
    """
    step, is_cpu, wide = heavy.load, device.kind == "cpu", sizes.itemsize == 4
    scores = 0 if not is_cpu or wide else sizes.itemsize * sizes.heads * step.short_squares
    kept_L = [int(sizes.kept * sizes.itemsize * step.tokens * features) + scores for features in sizes.features_L]
    largest, widest = max(kept_L, default=0), sizes.itemsize * max(sizes.features_L, default=0)
    at_work = int(AT_WORK * widest * step.tokens) + (largest if recomputed else 0)
    inputs = recomputed * sizes.itemsize * step.tokens * sizes.hidden
    activations = sum(kept_L[max(recomputed, sizes.first) :]) + inputs + at_work
    # Logits as they are computed, in float32, and their softmax.
    looked = min(look.targets, _read_piece(sizes, is_cpu) // (4 * sizes.outputs)) if sizes.fused_loss else look.targets
    looked_logits = looked * sizes.outputs * (8 if wide else 8 + sizes.itemsize)
    needs = {  # gradients, activations, logits
        "step": (sizes.gradients if heavy.accumulating else 0, activations, _logits(sizes, step.targets, is_cpu)),
        "update": (sizes.gradients, at_work, 0),
        "evaluation": (0, int(AT_WORK * widest * look.tokens), looked_logits),
    }
    # In bfloat16 small compiled products lie between the blocks of a phase: its memory does not go back to the system,
    # and another phase takes its own besides.
    left = 0 if wide or not is_cpu else min(sum(needs[phase][1:]) for phase in ("step", "evaluation"))
    held = {"weights": sizes.weights, "masters": sizes.masters, "optimizer": sizes.optimizer}
    runtime = LIBRARIES + libraries_keep(wide=wide) if is_cpu else CUDA_CONTEXT
    found = []
    for phase, (gradients, kept, logits) in needs.items():
        unused = left if is_cpu else int(CUDA_UNUSED * (sum(held.values()) + gradients + kept + logits))
        more = {"gradients": gradients, "activations": kept, "logits": logits, "runtime": runtime, "allocator": unused}
        found.append(Memory(phase, **held, **more))
    return found


def libraries_keep(*, wide: bool) -> int:
    """Bytes that the libraries of a processor keep of products in float32 (`wide`) or bfloat16, at most."""
    if wide:
        return BUFFERS
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    return COMPILED * max(int(os.environ.get(name, "1024")) for name in names)


def _logits(sizes: Sizes, targets: int, is_cpu: bool) -> int:
    """Logits of a piece of the targets in float32 with their gradient, and the gradient of the output layer."""
    weight = sizes.hidden * sizes.outputs
    of_weight = (4 + sizes.itemsize) * weight if sizes.trains_output else 0
    if not sizes.fused_loss:
        return targets * sizes.outputs * (12 + sizes.itemsize) + of_weight
    piece = max(_piece(is_cpu), CHUNK_BYTES_TRAINED) if sizes.trains_output else _read_piece(sizes, is_cpu)
    return 2 * min(piece, 4 * targets * sizes.outputs) + of_weight


def _piece(is_cpu: bool) -> int:
    """Bytes of float32 logits of a piece of the targets, on the device that is planned for."""
    return CHUNK_BYTES["cpu"] if is_cpu else CHUNK_BYTES_ELSEWHERE


def _read_piece(sizes: Sizes, is_cpu: bool) -> int:
    """`_piece` where the output layer is not trained."""
    return max(_piece(is_cpu), 4 * CHUNK_TARGETS * sizes.outputs)


def _stack(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in its order; of layers that share weights, as ALBERT's, each as often as it is used.

    Models whose layers cannot be recomputed keep them in the longest list of an encoder or a decoder, or in several
    such lists, one for each part of a layer, as XLM does.
    """
    if layers := layers_of(model):
        return list(layers)
    lists: dict[str, list[nn.ModuleList]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside):
            lists.setdefault(name.rpartition(".")[0], []).append(module)
            inside = (*inside, f"{name}.")
    stack: list[nn.Module] = []
    for some in lists.values():
        most = max(map(len, some))
        stack += map(nn.ModuleList, zip(*(one for one in some if len(one) == most), strict=True))
    return stack * max(1, int(getattr(model.config, "num_hidden_layers", 0)) // max(1, len(stack)))


def _features(layer: nn.Module) -> int:
    """Outputs of a layer's linear layers, and their inputs: those of one module that are as wide count once."""
    found = 0
    for parent in layer.modules():
        widths = [width for child in parent.children() if (width := _width(child)) is not None]
        found += sum(out for _, out in widths) + sum({inner for inner, _ in widths})
    return found


def _width(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer, which SqueezeBERT writes as a convolution; None for any other module."""
    if isinstance(module, nn.Conv1d) and module.kernel_size == (1,):
        return module.in_channels, module.out_channels
    if not isinstance(module, LINEARS):
        return None
    out = int(getattr(module, "out_features", 0) or getattr(module, "nf", 0))
    return sum(module.get_parameter("weight").shape) - out, out


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


QUANTIZED_BITS = 4.127
"""Bits of a weight with its scales: 4, 8 for a block of 64, and 32 for 256 blocks (Dettmers et al. 2023, "QLoRA", arXiv
2305.14314, section 3)."""


def _quantized_away(model: nn.Module) -> int:
    """Bytes that a quantised base does not hold. One layer at a time is unpacked."""
    weights = _linear_weights(model)
    saved = sum(weight.nbytes - round(weight.numel() * QUANTIZED_BITS / 8) for weight in weights)
    return saved - max(weight.nbytes for weight in weights)


def _linear_weights(model: nn.Module) -> list[Tensor]:
    return [target.module.get_parameter("weight") for target in inner_linears(model)]
