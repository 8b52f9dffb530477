"""LoRA and DoRA on a whole model: it is frozen, low-rank adapters on its linear layers are trained, and with
them what the recipe names and a new head, whole.
"""

# I inputs, O outputs, R rank

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.lora_layer import DoraLinear, LoraLinear, initial_matrices
from tunesmith.methods.master_weights import MasterWeights
from tunesmith.methods.new_token_embeddings import TokenRows
from tunesmith.methods.qlora import unpack_base
from tunesmith.methods.targets import (
    GROUPS,
    SEEING,
    Target,
    by_pattern,
    find_modules,
    find_targets,
    not_linear,
    refuse_frozen_new,
    replace_module,
    routers,
    tied_modules,
    unread_linears,
    weights_of,
)
from tunesmith.models.heads import new_head_names
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.models.special_tokens import new_token_ids
from tunesmith.recipe.methods import DoraMethod, LowRankMethod
from tunesmith.types import Aside, Attachment

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class Adapted:
    """A layer with the rank and alpha of its adapter."""

    target: Target
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Whole:
    """Names, in the plain model, of weights that are trained whole, with adapters."""

    head: tuple[str, ...] = ()
    """Weights."""
    modules: tuple[str, ...] = ()


class LoraAttachment(Attachment):
    """The adapters on a model. `trained` has for each layer `<layer>.lora_A.weight` [R, I] and
    `<layer>.lora_B.weight` [O, R], with DoRA `<layer>.lora_magnitude_vector` [O]; then weights trained whole,
    and rows of new tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[tuple[Adapted, LoraLinear]],
        *,
        whole: Whole,
        weights: Mapping[str, nn.Parameter],
        settings: LowRankMethod,
        rows: TokenRows | None = None,
    ) -> None:
        """`weights`: the parameters that `whole` names."""
        self.model: PreTrainedModel = model
        self.method = settings.name
        self.whole = whole
        self.settings = settings
        self.weights = dict(weights)
        self.layers = {adapted.target.name: layer for adapted, layer in layers}
        self.sizes = {adapted.target.name: adapted for adapted, _ in layers}
        self.rows = rows
        matrices = {
            f"{name}.{matrix}.weight": getattr(layer, matrix)
            for name, layer in self.layers.items()
            for matrix in ("lora_A", "lora_B")
        }
        magnitudes = {
            f"{name}.{MAGNITUDE}": layer.lora_magnitude_vector
            for name, layer in self.layers.items()
            if isinstance(layer, DoraLinear)
        }
        token_rows = {} if rows is None else rows.parameters
        self._masters = MasterWeights({**matrices, **magnitudes, **weights, **token_rows}, free_early=False)
        self.trained: Mapping[str, Tensor] = self._masters.trained
        if (ratio := settings.loraplus_ratio) != 1:
            # Hayou, Ghosh & Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
            self.rate_factors = {name: ratio for name in self.trained if name.endswith(".lora_B.weight")}

    @property
    def keeps_base(self) -> bool:
        """Whether the model without adapters is the base: of weights trained whole, only a head may be."""
        return not (self.whole.modules or self.rows)

    @property
    def trains_token_rows(self) -> bool:
        return self.rows is not None

    def collect_gradients(self) -> None:
        self._masters.collect()

    def publish(self) -> None:
        self._masters.publish()
        if self.rows is not None:
            self.rows.publish()
        for layer in self.layers.values():
            layer.refresh()

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """The float32 A [R, I] and B [O, R] of one layer."""
        return self.trained[f"{name}.lora_A.weight"], self.trained[f"{name}.lora_B.weight"]

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        layers = list(self.layers.values())
        for layer in layers:
            layer.active = False
        try:
            yield
        finally:
            for layer in layers:
                layer.active = True

    @torch.no_grad()
    def merged(self, name: str, layer: LoraLinear) -> Tensor:
        """The weight of a layer with its adapter in it: float32, in the orientation of the base's."""
        merged_OI = layer.merged_OI(*self.matrices(name))
        return merged_OI.t() if layer.is_transposed else merged_OI

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter to its layer's weight, in float32 and rounded once, and remove the adapters.

        Raises ModelError on a quantised base: its weights cannot hold what an adapter adds to them.
        """
        if packed := [name for name, layer in self.layers.items() if isinstance(layer.base, QuantizedLinear)]:
            raise ModelError(
                f"{packed[0]}: its weight is quantised, and rounding would eat what the adapter adds. Put the "
                "saved adapter on the base as it was before, and merge there: `tunesmith export RUN --to "
                "merged` does."
            )
        for name, layer in self.layers.items():
            layer.weight.copy_(self.merged(name, layer))
        self.unload()

    @torch.no_grad()
    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        layers = {f"{name}.weight": layer for name, layer in self.layers.items()}
        self.unload()
        for name, weight in unpack_base(self.model).state_dict().items():
            layer = layers.get(name)
            yield name, weight.detach().float() if layer is None else self.merged(name.removesuffix(".weight"), layer)

    def unload(self) -> None:
        """Give the model its own layers back."""
        for adapted in self.sizes.values():
            replace_module(self.model, adapted.target, adapted.target.module)
        if self.rows is not None:
            self.rows.unload()
        self.layers, self.sizes = {}, {}


def attach(model: PreTrainedModel, settings: LowRankMethod, *, seed: int) -> LoraAttachment:
    """Freeze `model` but for its head and what else is trained whole, and put fresh adapters on it.

    Outputs do not change until the first update, to the last bit.

    Raises:
        RecipeError: what cannot be adapted or trained whole, a setting that means nothing here, or a model that
            carries adapters already, or that guesses tokens with output layers that are new.
    """
    refuse_frozen_new(model, f"method.name: {settings.name}")
    head = new_head_names(model)
    targets, left_out, unread = find_targets(model, settings.targets), not_linear(model), unread_linears(model)
    ranks = by_pattern(model, targets, settings.rank_pattern, option="method.rank_pattern")
    alphas = by_pattern(model, targets, settings.alpha_pattern, option="method.alpha_pattern")
    adapted = [
        Adapted(target, int(ranks.get(target.name, settings.rank)), alphas.get(target.name, settings.alpha))
        for target in targets
    ]
    modules = find_modules(model, settings.also_train, targets)
    rows = _new_tokens(model, targets, modules)
    attachment = put_adapters(model, adapted, whole=Whole(head, modules), settings=settings, rows=rows)
    attachment.notes = tuple(
        f"method.also_train: {other} is trained with {tied}: they are one weight (tied)"
        for other, tied in tied_modules(model, modules).items()
    )
    if left_out and not {"all-linear", "mlp"}.isdisjoint(settings.targets):
        text = f"{len(left_out)} modules such as {left_out[0]} are not linear layers: they have no adapter, stay frozen"
        attachment.notes += (Aside(text),)
    if not set(GROUPS).isdisjoint(settings.targets) and (gates := [gate.name for gate in routers(model)]):
        what = f"{len(gates)} layers such as {gates[0]} choose experts"
        attachment.notes += (Aside(f"{what}: they have no adapter but where method.targets names them"),)
    if unread:
        text = f"{len(unread)} linear layers such as {unread[0].name} are not run by text: they have no adapter"
        attachment.notes += (Aside(text),)
    for name, layer in attachment.layers.items():
        matrices = initial_matrices(layer, name=name, seed=seed)
        with torch.no_grad():
            for master, start in zip(attachment.matrices(name), matrices, strict=True):
                master.copy_(start)
    attachment.publish()
    for layer in attachment.layers.values():
        if isinstance(layer, DoraLinear):
            layer.measure()
    return attachment


def put_adapters(
    model: PreTrainedModel,
    adapted: Sequence[Adapted],
    *,
    whole: Whole,
    settings: LowRankMethod,
    rows: Sequence[int] = (),
) -> LoraAttachment:
    """Freeze `model` but for `whole` and the `rows` of these tokens, and put adapters of zeros on it."""
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise RecipeError("method: the model carries adapters already. Merge them or take them off first.")
    weights = {name: model.get_parameter(name) for name in whole.head}
    weights |= weights_of(model, whole.modules)
    model.requires_grad_(False)
    layer_class = DoraLinear if isinstance(settings, DoraMethod) else LoraLinear
    layers = []
    for layer_to_adapt in adapted:
        scale = layer_to_adapt.alpha / (layer_to_adapt.rank**0.5 if settings.rslora else layer_to_adapt.rank)
        layer = layer_class(
            layer_to_adapt.target.module, rank=layer_to_adapt.rank, scale=scale, dropout=settings.dropout
        )
        layer.train(layer_to_adapt.target.module.training)
        replace_module(model, layer_to_adapt.target, layer)
        layers.append((layer_to_adapt, layer))
    token_rows = TokenRows(model, rows) if rows else None
    return LoraAttachment(model, layers, whole=whole, weights=weights, settings=settings, rows=token_rows)


def _new_tokens(model: PreTrainedModel, targets: Sequence[Target], modules: Sequence[str]) -> tuple[int, ...]:
    """The new tokens whose rows are trained; none if the embedding is trained whole.

    Raises RecipeError where head or embedding would be trained in two ways.
    """
    ids = new_token_ids(model)
    if not ids:
        return ()
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(table): table for table in both if table}
    weights = {id(table.weight) for table in tables.values()}
    trained_whole = {id(weight) for weight in weights_of(model, modules).values()} & weights
    adapted = [target.name for target in targets if id(target.module) in tables]
    if adapted or (trained_whole and trained_whole != weights):
        names = [name for name, module in model.named_modules() if id(module) in tables]
        raise RecipeError(
            f"data.new_tokens: {' and '.join(names)} have rows of the new tokens: name all of them in "
            "method.also_train, or none there and in method.targets."
        )
    return () if trained_whole else ids


# The method's fields in METHODS


def learning_rate(settings: LowRankMethod, kind: str, num_parameters: int) -> tuple[float, str]:
    """The usual peak rate with AdamW, and why."""
    is_small = num_parameters < 1e9
    where = "below" if is_small else "above"
    return (5e-4 if is_small else 2e-4), f"usual for LoRA on a model {where} a billion weights"


def describe(settings: LowRankMethod) -> str:
    """One sentence for a model card."""
    scaled = ", rank-stabilised" if settings.rslora else ""
    name = "DoRA" if isinstance(settings, DoraMethod) else "LoRA"
    return f"{name} of rank {settings.rank}, alpha {settings.alpha:g}{scaled}."


def unshareable(settings: LowRankMethod) -> str | None:
    """Why such an adapter cannot share one base in memory with others; None: it can."""
    if isinstance(settings, DoraMethod):
        return f"method {settings.name} is more than low-rank paths on layers"
    if settings.also_train:
        return f"{', '.join(settings.also_train)} were trained whole"
    if not set(SEEING).isdisjoint(settings.targets):
        return "the part of the model that sees was adapted"
    return None
