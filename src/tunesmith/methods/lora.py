"""LoRA and DoRA on a whole model: it is frozen, low-rank adapters on its linear layers and experts are trained,
and with them what the recipe names and a new head, whole.
"""

# I inputs, O outputs, R rank

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.expert_lora import ExpertLora, usual_rank
from tunesmith.methods.lora_layer import DoraLinear, LoraLinear, initial_matrices
from tunesmith.methods.master_weights import MasterWeights
from tunesmith.methods.new_token_embeddings import TokenRows
from tunesmith.methods.qlora import unpack_base
from tunesmith.methods.targets import (
    EXPERTS,
    GROUPS,
    SEEING,
    Target,
    by_pattern,
    expert_targets,
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
from tunesmith.models.experts import ExpertMatrix, experts_per_token
from tunesmith.models.heads import new_head_names
from tunesmith.models.quantized import QuantizedLinear, num_weights
from tunesmith.models.quantized_experts import QuantizedExperts
from tunesmith.models.special_tokens import new_token_ids
from tunesmith.phrases import size
from tunesmith.recipe.methods import DoraMethod, LowRankMethod
from tunesmith.types import Aside, Attachment

MAGNITUDE = "lora_magnitude_vector"
TRAINED_BYTES = 16
"""Bytes of a trained weight: itself, its gradient and AdamW's two averages, in float32."""
LoraLayer: TypeAlias = LoraLinear | ExpertLora


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
    `<layer>.lora_B.weight` [O, R], with DoRA `<layer>.lora_magnitude_vector` [O], for products of experts [E,
    R, I] and [E, O, R]; then weights trained whole, and rows of new tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[tuple[Adapted, LoraLayer]],
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
        """The float32 A [R, I] and B [O, R] of one layer, of each expert if it is of experts."""
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
    def merged(self, name: str, layer: LoraLayer) -> Tensor:
        """The weight of a layer with its adapter in it: float32, in the orientation of the base's."""
        merged_OI = layer.merged_OI(*self.matrices(name))
        return merged_OI.mT if layer.is_transposed else merged_OI

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter to its layer's weight, in float32 and rounded once, and remove the adapters.

        Raises ModelError on a quantised base: its weights cannot hold what an adapter adds to them.
        """
        kinds = QuantizedLinear, QuantizedExperts
        if packed := [name for name, layer in self.layers.items() if isinstance(layer.base, kinds)]:
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
        # The tensor of a product of experts has the name of its layer.
        owners = {name if isinstance(of, ExpertLora) else f"{name}.weight": name for name, of in self.layers.items()}
        layers = dict(self.layers)
        self.unload()
        for name, weight in unpack_base(self.model).state_dict().items():
            owner = owners.get(name)
            yield name, weight.detach().float() if owner is None else self.merged(owner, layers[owner])

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
    targets = find_targets(model, settings.targets)
    _refuse_with_experts(settings, targets)
    adapted = _sized(model, settings, targets)
    modules = find_modules(model, settings.also_train, targets)
    rows = _new_tokens(model, targets, modules)
    notes = _notes(model, settings, adapted, modules)
    attachment = put_adapters(model, adapted, whole=Whole(head, modules), settings=settings, rows=rows)
    attachment.notes = notes
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


def _sized(model: PreTrainedModel, settings: LowRankMethod, targets: Sequence[Target]) -> list[Adapted]:
    """The layers with the ranks and alphas of their adapters."""
    ranks = by_pattern(model, targets, settings.rank_pattern, option="method.rank_pattern")
    alphas = by_pattern(model, targets, settings.alpha_pattern, option="method.alpha_pattern")
    of_experts = usual_rank(settings.rank, experts_per_token(model.config))
    usual = {target.name: of_experts if target.is_of_experts else settings.rank for target in targets}
    sizes = usual | ranks
    return [Adapted(target, int(sizes[target.name]), alphas.get(target.name, settings.alpha)) for target in targets]


def _refuse_with_experts(settings: LowRankMethod, targets: Sequence[Target]) -> None:
    """Raise RecipeError for options that experts have not, in PEFT neither."""
    if not any(target.is_of_experts for target in targets):
        return
    if isinstance(settings, DoraMethod):
        raise RecipeError(
            "method.targets: experts: dora trains the lengths of rows, which experts have no adapter for, in PEFT "
            "neither. Use method: lora, or leave experts out."
        )
    if settings.dropout:
        raise RecipeError(
            f"method.dropout: {settings.dropout}: not with experts, whose adapters PEFT could then not read. Set it "
            "to 0, or leave experts out of method.targets."
        )


def _notes(
    model: PreTrainedModel, settings: LowRankMethod, adapted: Sequence[Adapted], modules: Sequence[str]
) -> tuple[str, ...]:
    """Facts about which layers have adapters that a person should know; `model`: before they are put on it."""
    notes = [
        f"method.also_train: {other} is trained with {tied}: they are one weight (tied)"
        for other, tied in tied_modules(model, modules).items()
    ]
    experts = expert_targets(model)
    holders = {target.name.rpartition(".")[0] for target in experts}
    left_out = [name for name in not_linear(model) if name not in holders]
    if left_out and not {"all-linear", "mlp"}.isdisjoint(settings.targets):
        text = f"{len(left_out)} modules such as {left_out[0]} are not linear layers: they have no adapter, stay frozen"
        notes.append(Aside(text))
    if not set(GROUPS).isdisjoint(settings.targets) and (gates := [gate.name for gate in routers(model)]):
        what = f"{len(gates)} layers such as {gates[0]} choose experts"
        notes.append(Aside(f"{what}: they have no adapter but where method.targets names them"))
    if experts:
        of_experts = [layer for layer in adapted if layer.target.is_of_experts]
        notes.append(_note_on_experts(model, settings, experts, of_experts))
    modules_adapted = {id(layer.target.module) for layer in adapted}
    if unread := [target for target in unread_linears(model) if id(target.module) not in modules_adapted]:
        text = f"{len(unread)} linear layers such as {unread[0].name} are not run by text: they have no adapter"
        notes.append(Aside(text))
    return tuple(notes)


def _note_on_experts(
    model: PreTrainedModel, settings: LowRankMethod, experts: Sequence[Target], adapted: Sequence[Adapted]
) -> str:
    """A line on the adapters of the experts of a mixture."""
    layers_of_experts: list[Any] = [target.module for target in experts]
    shapes = [layer.shape_EOI for layer in layers_of_experts]
    if not adapted:
        share = sum(map(prod, shapes)) / num_weights(model)
        words = ", ".join([*settings.targets, EXPERTS])
        way = f"method.targets: [{words}] adapts them" + (" with lora" if isinstance(settings, DoraMethod) else "")
        rank = usual_rank(settings.rank, experts_per_token(model.config))
        more = sum(num_experts * rank * (outputs + inputs) for num_experts, outputs, inputs in shapes)
        cost = f"{more:,} weights more to train in {size(TRAINED_BYTES * more)}"
        return f"the experts, {share:.0%} of the weights, have no adapter: {way}, {cost}"
    names = list(dict.fromkeys(layer.target.name.rpartition(".")[2] for layer in adapted))
    layers = {layer.target.name.rpartition(".")[0] for layer in adapted}
    ranks = " or ".join(map(str, sorted({layer.rank for layer in adapted})))
    return (
        f"adapters of rank {ranks} on {' and '.join(names)} of {shapes[0][0]} experts in each of {len(layers)} layers, "
        f"of which a token meets {experts_per_token(model.config)}; what chooses experts stays as it is"
    )


def put_adapters(
    model: PreTrainedModel,
    adapted: Sequence[Adapted],
    *,
    whole: Whole,
    settings: LowRankMethod,
    rows: Sequence[int] = (),
) -> LoraAttachment:
    """Freeze `model` but for `whole` and the `rows` of these tokens, and put adapters of zeros on it."""
    if any(isinstance(module, (LoraLinear, ExpertLora)) for module in model.modules()):
        raise RecipeError("method: the model carries adapters already. Merge them or take them off first.")
    weights = {name: model.get_parameter(name) for name in whole.head}
    weights |= weights_of(model, whole.modules)
    model.requires_grad_(False)
    layers = []
    for layer_to_adapt in adapted:
        layer = _adapter_on(layer_to_adapt, settings)
        layer.train(layer_to_adapt.target.module.training)
        replace_module(model, layer_to_adapt.target, layer)
        layers.append((layer_to_adapt, layer))
    token_rows = TokenRows(model, rows) if rows else None
    return LoraAttachment(model, layers, whole=whole, weights=weights, settings=settings, rows=token_rows)


def _adapter_on(adapted: Adapted, settings: LowRankMethod) -> LoraLayer:
    """An adapter of zeros."""
    scale = adapted.alpha / (adapted.rank**0.5 if settings.rslora else adapted.rank)
    base = adapted.target.module
    if isinstance(base, (ExpertMatrix, QuantizedExperts)):
        return ExpertLora(base, rank=adapted.rank, scale=scale)
    layer_class = DoraLinear if isinstance(settings, DoraMethod) else LoraLinear
    return layer_class(base, rank=adapted.rank, scale=scale, dropout=settings.dropout)


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
    also = ", on experts too" if _names_experts(settings) else ""
    return f"{name} of rank {settings.rank}, alpha {settings.alpha:g}{scaled}{also}."


def _names_experts(settings: LowRankMethod) -> bool:
    return any(EXPERTS in word for word in settings.targets)


def unshareable(settings: LowRankMethod) -> str | None:
    """Why such an adapter cannot share one base in memory with others; None: it can."""
    if isinstance(settings, DoraMethod):
        return f"method {settings.name} is more than low-rank paths on layers"
    if settings.also_train:
        return f"{', '.join(settings.also_train)} were trained whole"
    if not set(SEEING).isdisjoint(settings.targets):
        return "the part of the model that sees was adapted"
    if _names_experts(settings):
        return "it has adapters on experts, which see other rows than the tokens of a pass"
    return None
