"""Peak memory by formula. It is an estimate: docs/guide/planning.md says what it counts.

    peak = runtime + weights + master weights + optimizer + vectors of images + the larger of these, + unused reserve

    step    gradients of the micro-batches before + activations kept + one layer at work + logits in pieces
    images  gradients of the micro-batches before + the vision tower at work on one of them
    update  gradients + one layer at work
    look    one layer at work + logits of the rows that are measured, in pieces where the loss is fused
            + keys and values of prompts that are answered together

A layer keeps a multiple of the inputs and outputs of its linear layers; a recomputed one keeps its input alone
(Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.data.dataset import RowStore
from tunesmith.data.sampler import MicroBatch
from tunesmith.errors import RecipeError
from tunesmith.methods import METHODS, attach
from tunesmith.methods.targets import inner_linears, shape_OI
from tunesmith.models.experts import expert_layers, experts_per_token
from tunesmith.models.fast_layers import keeps_less, reads_again
from tunesmith.models.fused_loss import (
    CHUNK_BYTES,
    CHUNK_BYTES_TRAINED,
    CHUNK_TARGETS,
    chunk_on_card,
    output_layer_of,
)
from tunesmith.models.image_features import sees_as_before
from tunesmith.models.modes import layers_of, silence_transformers
from tunesmith.models.packing_check import recurrent_layer
from tunesmith.models.quantized_experts import fits
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.size import meta_model
from tunesmith.optim import Optimizer
from tunesmith.planning.devices import CUDA_CONTEXT, Device
from tunesmith.planning.tower import ImageBytes, Shown, Tower, room_for_images
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.types import HeadName, JsonObject, Labels

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AT_WORK = 0.7
"""Memory that the backward of a layer holds besides kept activations, by inputs and outputs of linears."""
LESS_BY_NODES = {2: 0.43, 4: 0.28}
"""By bytes of a number: what a layer keeps less, of the same, where its norms and its gated MLP are one node
each: neither copies in float32 nor act(g) and its product with u."""
LIBRARIES_NARROW, LIBRARIES_WIDE = 170 * 2**20, 112 * 2**20
"""Bytes that torch and oneDNN keep for themselves on a processor: code, compiled products in bfloat16, copied
operands in float32."""
CUDA_UNUSED = 0.05
"""Share of the tensors' memory that the allocator of a card cannot use."""
SOFTCAP_BYTES = 18
"""Bytes of a squashed score: in float32 product, tangent, masked value and weight, and the weight narrow."""
QUANTIZED_BITS = 4.127
"""Bits of a weight with its scales: 4, 8 for a block of 64, and 32 for 256 blocks (Dettmers et al. 2023,
"QLoRA", arXiv 2305.14314, section 3)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model with its method attached, in numbers of bytes (what is held throughout) and of features."""

    weights: int
    masters: int
    """float32 copies of what is trained, where it is computed in another type."""
    optimizer: int
    trained_parameters: int
    itemsize: int
    layers: int
    """A shared layer counts once for each use."""
    recomputable: int
    """Layers whose activations can be recomputed, the first ones: all or none."""
    features: int
    """Inputs and outputs of all linear layers, for one token, and of the experts that it goes to."""
    kept: float
    """Times that a layer keeps these for its backward: the method's row says."""
    first: int
    """Index of the first layer with gradients: the layers below keep nothing."""
    linear_weights: int
    """In the layers; a shared layer counts once for each use, and of experts those that a token goes to."""
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
    """Bytes of layers that are split over devices: a pass joins them for the forward and the backward."""
    elsewhere: int = 0
    """Trained weights that other devices keep."""
    notes: tuple[str, ...] = ()
    """Notes on the method, as attached to this model."""
    cached: int = 0
    """Bytes of the keys and values of a token, in all layers."""
    less: float = 0.0
    """Times less than `kept`, but for Apple's device: `LESS_BY_NODES`."""
    again: int = 0
    """Numbers of a token and layer that are not kept on a processor: answers of norms, computed again."""
    softcap: bool = False
    """Scores are squashed, so that all of them are kept."""
    tower: Tower | None = None
    """The vision tower of a model that sees."""

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
    """The heaviest micro-batch of a run."""

    step: int
    rows: MicroBatch
    accumulating: bool
    """Whether the step has other micro-batches, so that gradients are there already."""
    load: Load


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for, at the moment that needs the most."""

    weights: int
    master_weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    images: int = 0
    """Vectors of images that are kept."""
    other_models: int = 0
    """Weights of models that grade or teach."""
    runtime: int = 0
    """Python, torch, and what they keep for themselves."""
    unused_reserve: int = 0
    """Freed memory that the process does not give back."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Component → bytes."""
        return {name.replace("_", " "): num for name, num in asdict(self).items()}


def sizes_of(
    recipe: Recipe, located: ModelRef, *, head: HeadName, labels: Labels | None, store: RowStore | None
) -> tuple[Sizes, nn.Module]:
    """The sizes of a recipe's model, made without weights, and that model. Raises ModelError where no model can
    be made from the config alone, and what attaching the method raises."""
    method = METHODS[recipe.method.name]
    with torch.device("meta"), silence_transformers():
        model = meta_model(located, dtype=TORCH_DTYPES[resolved(recipe.precision)], head=head, labels=labels)
    modules = [target.module for target in inner_linears(model, unread=False)]
    features = sum(sum(shape_OI(module)) for module in modules)
    linears = [module.get_parameter("weight") for module in (*modules, *_linear_convs(model))]
    experts = _Experts.of(model)
    saved = _saved_by_packing(model, experts) if method.quantizes else 0
    features += sum(conv.in_channels + conv.out_channels for conv in _linear_convs(model)) + experts.features
    stack, config = layers_of(model), model.config.get_text_config()
    split = _split_weights(model, recipe.model) if recipe.shard is True else {}
    layers = len(stack) or max(1, int(getattr(config, "num_hidden_layers", 1)))
    uses = layers // int(getattr(config, "num_hidden_groups", layers))  # ALBERT runs a layer again
    with torch.device("meta"):
        attachment = attach(recipe, model, head=head, store=store, pad_id=0)
    computing = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    masters = sum(tensor.nbytes for tensor in attachment.trained.values() if id(tensor) not in computing)
    state = Optimizer(attachment.trained, recipe.optim, factors=attachment.rate_factors).state_bytes()
    below = attachment.trains_token_rows or _learns(model.get_input_embeddings()) or not sees_as_before(model)
    first = 0 if below else next((i for i, layer in enumerate(stack) if _learns(layer)), len(stack))
    output = model.get_output_embeddings()
    linear_weights = sum(weight.numel() for weight in linears) + experts.met
    trained_weights = sum(weight.numel() for weight in linears if weight.requires_grad) + experts.trained
    num_trained, gathered = sum(tensor.numel() for tensor in attachment.trained.values()), sum(split.values())
    elsewhere = 1 - 1 / resolved(recipe.devices) if split else 0.0  # split share on other devices
    num_own = num_trained - int(elsewhere * sum(t.numel() for name, t in attachment.trained.items() if name in split))
    # Of layers that are split, one that computes and the next one are whole.
    largest = sorted((sum(p.nbytes for p in layer.parameters()) for layer in stack if split), reverse=True)[:2]
    return Sizes(
        weights=sum(computing.values()) - saved - int(elsewhere * gathered) + sum(largest),
        masters=masters * num_own // max(1, num_trained),
        optimizer=state * num_own // max(1, num_trained),
        trained_parameters=num_trained,
        itemsize=model.dtype.itemsize,
        layers=layers,
        recomputable=len(stack),
        features=features * uses,
        kept=method.kept_activations,
        **(_less_by_nodes(model, layers) if recipe.kernels == "fast" and recipe.shard is not True else {}),
        first=first,
        linear_weights=linear_weights * uses,
        trains_linear=trained_weights / max(1, linear_weights),
        hidden=int(config.hidden_size),
        heads=int(getattr(config, "num_attention_heads", 1)),
        outputs=labels.num_outputs if labels is not None else 0 if head == "vector" else int(config.vocab_size),
        trains_output=output is not None and _learns(output),
        fused_loss=recipe.kernels == "fast" and method.fused_loss and output_layer_of(model) is not None,
        can_pack=not recurrent_layer(model),
        gathered=gathered,
        elsewhere=num_trained - num_own,
        notes=tuple(attachment.notes),
        cached=2 * layers * _key_size(config) * model.dtype.itemsize,
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
    ), model


@dataclass(frozen=True, slots=True)
class _Experts:
    """The products of experts in a model without numbers, as far as one token meets them."""

    weights: tuple[Tensor, ...]
    per_token: int
    features: int
    """Inputs and outputs of the experts that a token goes to."""
    packed: tuple[Tensor, ...]
    """`weights` that are kept in 4 bits where the method quantizes."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> _Experts:
        layers: list[Any] = list(expert_layers(model).values())
        per_token = experts_per_token(model.config)
        features = per_token * sum(sum(layer.shape_EOI[1:]) for layer in layers)
        packed = tuple(layer.weight for layer in layers if fits(layer))
        return cls(tuple(layer.weight for layer in layers), per_token, features, packed)

    @property
    def met(self) -> int:
        """Weights that a token is multiplied by."""
        return sum(self.per_token * weight[0].numel() for weight in self.weights)

    @property
    def trained(self) -> int:
        """Weights among `met` that are trained whole."""
        return sum(self.per_token * weight[0].numel() for weight in self.weights if weight.requires_grad)


def _saved_by_packing(model: PreTrainedModel, experts: _Experts) -> int:
    """Bytes that a base in 4 bits saves, of which one layer or expert at a time is unpacked."""
    packed = [target.module.get_parameter("weight") for target in inner_linears(model)]
    unpacked = max(w.nbytes for w in [*packed, *(weight[0] for weight in experts.packed)])
    return sum(w.nbytes - round(w.numel() * QUANTIZED_BITS / 8) for w in [*packed, *experts.packed]) - unpacked


def _linear_convs(model: nn.Module) -> list[nn.Conv1d]:
    """Linear layers that are written as convolutions, as SqueezeBERT does."""
    return [module for module in model.modules() if isinstance(module, nn.Conv1d) and module.kernel_size == (1,)]


def _key_size(config: PreTrainedConfig) -> int:
    """Numbers of a token's key in one layer."""
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return int(getattr(config, "num_key_value_heads", None) or heads) * int(size)


def _less_by_nodes(model: PreTrainedModel, layers: int) -> JsonObject:
    """`less` and `again` of the sizes, where each known layer is computed in one autograd node."""
    if not keeps_less(model):
        return {}
    hidden = int(model.config.get_text_config().hidden_size)
    return {"less": LESS_BY_NODES.get(model.dtype.itemsize, 0.0), "again": hidden * reads_again(model) // layers}


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def layers_to_split(model: nn.Module, name: str) -> Sequence[nn.Module]:
    """The layers of the model `name`, each with weights of its own. Raises
    RecipeError for a model that has none."""
    layers = layers_of(model)
    weights = [id(weight) for layer in layers for weight in layer.parameters()]
    if 0 < len(weights) == len(set(weights)):
        return layers
    why = "its layers share weights" if weights else "it has no list of layers that could be split"
    raise RecipeError(f"shard: true: not with model: {name}: {why}. Leave shard out.")


def _split_weights(model: PreTrainedModel, name: str) -> dict[str, int]:
    """Bytes of each weight that is split over devices, by its name. `name`: the model's."""
    inside = {id(weight) for layer in layers_to_split(model, name) for weight in layer.parameters()}
    return {name: weight.nbytes for name, weight in model.named_parameters() if id(weight) in inside}


def peak(
    sizes: Sizes,
    heavy: Heavy,
    look: Load,
    *,
    recomputed: int,
    device: Device,
    base: int,
    answered: int = 0,
    others: int = 0,
    shown: Shown | None = None,
    images: int = 0,
) -> Memory:
    """The most that a run needs. `look`: the heaviest micro-batch of rows that are measured, which fill
    passes where a step has too few; `recomputed`: number of layers recomputed in the backward pass;
    `base`: bytes already in use; `answered`: tokens whose keys and values are kept for answers;
    `others`: weights of other models; `shown`: images of the run, `images` of them in the heaviest one."""
    seen = _image_bytes(sizes, shown, images, device)
    load, is_cpu, wide = heavy.load, device.kind == "cpu", sizes.itemsize == 4
    scores = sizes.itemsize * sizes.heads * load.short_squares if is_cpu and not wide else 0
    if device.kind == "mps":  # torch has no attention there that forms its weights again for the backward pass
        scores = sizes.itemsize * sizes.heads * load.squares
    if sizes.softcap:  # spelled out, on every device
        scores = SOFTCAP_BYTES * sizes.heads * load.squares
    used = sizes.itemsize * load.tokens * sizes.features // sizes.layers  # inputs and outputs of a layer
    layer = int((sizes.kept - (sizes.less if device.kind != "mps" else 0)) * used) + scores
    layer -= sizes.itemsize * load.tokens * sizes.again if is_cpu else 0
    at_work = int(AT_WORK * used) + (layer if recomputed else 0)
    kept_layers = max(0, sizes.layers - max(recomputed, sizes.first)) * layer
    activations = kept_layers + recomputed * sizes.itemsize * load.tokens * sizes.hidden + at_work + seen.activations
    logits, of_output = _logits(sizes, load.targets, device)
    gradients = of_output + (sizes.gradients if heavy.accumulating else 0)
    # In bfloat16 small compiled products lie between the blocks of training, so that its memory does not go
    # back to the system, and what measuring rows needs comes besides.
    left = logits + at_work if is_cpu and not wide else 0
    read, _ = _logits(replace(sizes, trains_output=False), look.targets, device)
    if not sizes.fused_loss:  # logits as they are computed, in float32, and their softmax
        read = look.targets * sizes.outputs * (8 if wide else 8 + sizes.itemsize)
    kept_keys = answered * sizes.cached
    moments = [
        (gradients, activations, logits),
        (sizes.gradients, at_work, 0),
        (sizes.gradients if heavy.accumulating else 0, seen.at_work, 0),
        (0, int(AT_WORK * sizes.itemsize * look.tokens * sizes.features / sizes.layers) + kept_keys, read),
    ]
    gradients, activations, logits = max(moments, key=sum)
    runtime = (LIBRARIES_WIDE if wide else LIBRARIES_NARROW) if is_cpu else CUDA_CONTEXT
    tensors = sizes.weights + sizes.masters + sizes.optimizer + gradients + activations + logits
    return Memory(
        weights=sizes.weights,
        master_weights=sizes.masters,
        gradients=gradients,
        optimizer=sizes.optimizer,
        activations=activations,
        logits=logits,
        images=seen.kept if is_cpu else 0,  # they lie beside the processor
        other_models=others,
        runtime=base + runtime,
        unused_reserve=left if is_cpu else int(CUDA_UNUSED * tensors),
    )


def _image_bytes(sizes: Sizes, shown: Shown | None, images: int, device: Device) -> ImageBytes:
    if shown is None or sizes.tower is None:
        return ImageBytes()
    room = room_for_images(device)
    return sizes.tower.memory(shown, room, images=images, itemsize=sizes.itemsize, kept=sizes.kept)


def _logits(sizes: Sizes, targets: int, device: Device) -> tuple[int, int]:
    """Logits of a piece of the targets in float32, on a processor with the gradient in their place, elsewhere
    besides; both also in the type of the model where that is narrower; and the gradient of an output layer that
    learns, which is made in the forward pass."""
    of_output = (4 + sizes.itemsize) * sizes.hidden * sizes.outputs if sizes.trains_output else 0
    if not sizes.fused_loss:
        return targets * sizes.outputs * (12 + sizes.itemsize), of_output
    is_cpu = device.kind == "cpu"
    piece = CHUNK_BYTES["cpu"] if is_cpu else chunk_on_card(device.memory or device.room)
    least = CHUNK_BYTES_TRAINED if sizes.trains_output else 4 * CHUNK_TARGETS * sizes.outputs
    narrow = sizes.itemsize == 2
    times = (1.5 if narrow else 1.0) if is_cpu else 2.5 if narrow else 2.0
    return int(times * min(max(piece, least), 4 * targets * sizes.outputs)), of_output
