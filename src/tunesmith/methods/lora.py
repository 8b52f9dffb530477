"""LoRA and DoRA on a whole model: it is frozen, small matrices are trained beside linear layers, and what the recipe
names is trained whole beside them, such as a head that answers with classes or numbers.
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
from tunesmith.methods.dora import DoraLinear
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.methods.masters import Masters
from tunesmith.methods.quantize import unpack_base
from tunesmith.methods.starts import draw
from tunesmith.methods.targets import Target, by_pattern, find_targets, not_linear, replace_module
from tunesmith.methods.token_rows import TokenRows
from tunesmith.methods.whole import find_biases, find_modules, tied_notes, weights_of
from tunesmith.models.heads import new_head_names, new_param_names
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.models.special_tokens import new_token_ids
from tunesmith.recipe.methods import DoraMethod, LowRankMethod
from tunesmith.types import Attachment

MAGNITUDE = "lora_magnitude_vector"


@dataclass(frozen=True, slots=True)
class Adapted:
    """A layer that gets an adapter, and of what size."""

    target: Target
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class Whole:
    """What is trained as it is, beside adapters, by the names that it has without them."""

    head: tuple[str, ...] = ()
    """Weights."""
    modules: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


class LoraAttachment(Attachment):
    """The adapters on a model. `trained` has for each layer `<layer>.lora_A.weight` [R, I] and `<layer>.lora_B.weight`
    [O, R], with DoRA `<layer>.lora_magnitude_vector` [O]; behind them stands what is trained whole, by its own names.
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
        """`weights`: the parameters that `whole` names, found before the layers took their places."""
        self.model: PreTrainedModel = model
        self.method = settings.name
        self.whole = whole
        self.settings = settings
        self.weights = dict(weights)
        """What is trained whole, the parameters that compute, by name."""
        self.layers = {adapted.target.name: layer for adapted, layer in layers}
        self.sizes = {adapted.target.name: adapted for adapted, _ in layers}
        self._matrices = {
            f"{name}.{matrix}.weight": getattr(layer, matrix)
            for name, layer in self.layers.items()
            for matrix in ("lora_A", "lora_B")
        }
        lengths = {
            f"{name}.{MAGNITUDE}": layer.lora_magnitude_vector
            for name, layer in self.layers.items()
            if isinstance(layer, DoraLinear)
        }
        self.rows = rows
        """Rows of the embedding that are trained alone."""
        of_tokens = {} if rows is None else rows.parameters
        self._masters = Masters({**self._matrices, **lengths, **weights, **of_tokens}, free_early=False)
        self.trained: Mapping[str, Tensor] = self._masters.trained
        self.notes: tuple[str, ...] = ()
        """What a person should know about what is not trained."""
        ratio = settings.loraplus_ratio
        self.rate_factors: Mapping[str, float] = (
            {} if ratio == 1 else {name: ratio for name in self.trained if name.endswith(".lora_B.weight")}
        )
        """LoRA+ (Hayou, Ghosh & Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354)."""

    @property
    def head(self) -> tuple[str, ...]:
        """The weights of a head, which are trained whole."""
        return self.whole.head

    @property
    def keeps_base(self) -> bool:
        """Whether the model without adapters is the base: weights trained whole are then those of a head alone."""
        return not (self.whole.modules or self.whole.biases or self.rows)

    @property
    def unshareable(self) -> str | None:
        """What of the adapter is not a low-rank path beside a layer; None: nothing, so many can share one base."""
        if isinstance(self.settings, DoraMethod):
            return "its weights are rescaled row by row (DoRA)"
        if brought := [*self.whole.head, *self.whole.modules, *self.whole.biases]:
            return f"it brings {brought[0]} whole"
        if self.rows is not None:
            return f"it brings rows of {self.rows.names[0]} for new tokens"
        return None

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

    @torch.no_grad()
    def merged(self, name: str, layer: LoraLinear) -> Tensor:
        """What the weight of a layer is with its adapter in it: float32, lying as the base's does."""
        merged_OI = layer.merged_OI(*self.matrices(name))
        return merged_OI.t() if layer.lies_transposed else merged_OI

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Run the model without its adapters inside the block; what is trained whole stays as it was trained."""
        layers = list(self.layers.values())
        for layer in layers:
            layer.active = False
        try:
            yield
        finally:
            for layer in layers:
                layer.active = True

    @torch.no_grad()
    def merge(self) -> None:
        """Add every adapter to its layer's weight, in float32 and rounded once, and remove the adapters: a plain model
        is left, with all that was trained.

        Raises ModelError on a quantised base: its weights cannot hold what an adapter adds to them.
        """
        if packed := [name for name, layer in self.layers.items() if isinstance(layer.base, QuantizedLinear)]:
            raise ModelError(
                f"{packed[0]}: its weight is quantised, and rounding would eat what the adapter adds. Put the saved "
                "adapter on the base as it was before, and merge there: `tunesmith export RUN --to merged` does."
            )
        for name, layer in self.layers.items():
            layer.weight.copy_(self.merged(name, layer))
        self.unload()

    @torch.no_grad()
    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        layers = {f"{name}.weight": layer for name, layer in self.layers.items()}
        self.unload()
        for name, weight in unpack_base(self.model).state_dict().items():
            if name in layers:
                yield name, self.merged(name.removesuffix(".weight"), layers[name])
            else:
                yield name, weight.detach().float()

    def unload(self) -> None:
        """Give the model its own layers back; the attachment adapts nothing any more."""
        for adapted in self.sizes.values():
            replace_module(self.model, adapted.target, adapted.target.module)
        if self.rows is not None:
            self.rows.unload()
        self.layers = {}
        self.sizes = {}


def attach(model: PreTrainedModel, settings: LowRankMethod, *, seed: int) -> LoraAttachment:
    """Freeze `model` but for its head and what else is trained whole, and put fresh adapters on it.

    Outputs do not change until the first update. With `init: kaiming` to the last bit, since B is zero; A is drawn as
    PEFT draws it, uniform in ±1/√I. With the others but for rounding: see `methods.starts`.

    Raises:
        RecipeError: what cannot be adapted or trained whole, a setting that means nothing here, or a model that carries
            adapters already, or that guesses tokens with output layers that are new.
    """
    head = new_head_names(model)
    if drawn := [name for name in new_param_names(model) if name not in head]:
        raise RecipeError(
            f"method.name: {settings.name}: {drawn[0]} is new, and beside adapters it would stay the random numbers "
            "that it is. Use method: full, or a model whose masked-language head comes with it."
        )
    targets, left_out = find_targets(model, settings.targets, layers=settings.layers), not_linear(model)
    ranks = by_pattern(model, targets, settings.rank_pattern, option="method.rank_pattern")
    alphas = by_pattern(model, targets, settings.alpha_pattern, option="method.alpha_pattern")
    adapted = [
        Adapted(target, int(ranks.get(target.name, settings.rank)), alphas.get(target.name, settings.alpha))
        for target in targets
    ]
    modules = find_modules(model, settings.also_train, targets)
    biases = find_biases(model, settings.bias, targets, known={*head, *weights_of(model, modules)})
    rows = _rows(model, targets, modules)
    attachment = wrap(model, adapted, whole=Whole(head, modules, biases), settings=settings, rows=rows)
    attachment.notes = tied_notes(model, modules)
    if left_out and not {"all-linear", "mlp"}.isdisjoint(settings.targets):
        attachment.notes += (
            f"{len(left_out)} modules such as {left_out[0]} are not linear layers: they have no adapter, stay frozen",
        )
    for name, layer in attachment.layers.items():
        matrices = draw(layer, settings.init, name=name, seed=seed)
        with torch.no_grad():
            for master, start in zip(attachment.matrices(name), matrices, strict=True):
                master.copy_(start)
    attachment.publish()
    for layer in attachment.layers.values():
        if isinstance(layer, DoraLinear):
            layer.measure()
    return attachment


def _rows(model: PreTrainedModel, targets: Sequence[Target], modules: Sequence[str]) -> tuple[int, ...]:
    """The tokens whose rows are trained: the new ones, unless the embedding is trained whole.

    Raises RecipeError where head or embedding would be trained in two ways.
    """
    ids = new_token_ids(model)
    if not ids:
        return ()
    tables = {id(table): table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table}
    weights = {id(table.weight) for table in tables.values()}
    whole = {id(weight) for weight in weights_of(model, modules).values()} & weights
    adapted = [target.name for target in targets if id(target.module) in tables]
    if adapted or (whole and whole != weights):
        names = [name for name, module in model.named_modules() if id(module) in tables]
        raise RecipeError(
            f"data.new_tokens: {' and '.join(names)} have rows of the new tokens: name all of them in "
            "method.also_train, or none there and in method.targets."
        )
    return () if whole else ids


def wrap(
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
    weights |= {name: model.get_parameter(name) for name in whole.biases}
    model.requires_grad_(False)
    kind = DoraLinear if isinstance(settings, DoraMethod) else LoraLinear
    layers = []
    for one in adapted:
        scale = one.alpha / (one.rank**0.5 if settings.rslora else one.rank)
        layer = kind(one.target.module, rank=one.rank, scale=scale, dropout=settings.dropout)
        layer.train(one.target.module.training)
        replace_module(model, one.target, layer)
        layers.append((one, layer))
    of_tokens = TokenRows(model, rows) if rows else None
    return LoraAttachment(model, layers, whole=whole, weights=weights, settings=settings, rows=of_tokens)


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
    if settings.also_train or settings.bias != "none":
        return f"{', '.join(settings.also_train) or 'biases'} were trained whole"
    return None
