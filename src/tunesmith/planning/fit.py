"""Making a run fit into memory: as many layers recomputed and passes as small as it takes, and no more, or layers split
over devices; or saying what else would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tunesmith.environment import install_command
from tunesmith.errors import DoesNotFitError, RecipeError, TunesmithError
from tunesmith.methods import METHODS
from tunesmith.models import load
from tunesmith.models.resolve_model import ModelRef
from tunesmith.planning.defaults import with_choice
from tunesmith.planning.forecast import Forecast
from tunesmith.recipe.methods import LoraMethod, QloraMethod
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS, has_look
from tunesmith.types import Choice, ModelKind

MARGIN = 0.08
"""Share of the memory that automatic choices leave free: what a forecast by formula may be off."""
MOST_ALTERNATIVES = 3
SMALLEST_PASS = 128
"""Tokens: below, passes get slow without getting smaller."""

Predict = Callable[[Recipe], Forecast]


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan that fits."""

    settings: tuple[str, ...]
    """As `--set` takes them."""
    total: int
    """Predicted peak, bytes."""
    needs: str = ""
    """Packages to install first; empty: none."""

    def words(self) -> str:
        """For the command line, with the prediction."""
        needs = f", after: {self.needs}" if self.needs else ""
        return f"{' '.join(f'--set {setting}' for setting in self.settings)}  ({gib(self.total)}{needs})"


def gib(num_bytes: float) -> str:
    """Bytes as a person reads them: 3.41 GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def fit(recipe: Recipe, predict: Predict, *, longest: int, free_tokens: bool) -> tuple[Recipe, list[Choice], Forecast]:
    """The recipe with `train.checkpointed_layers` decided, and with `free_tokens` smaller passes if it takes them.

    What was set is left as it is, whether it fits or not.
    """
    automatic = recipe.train.checkpointed_layers == "auto"
    recipe = _with(recipe, "train.checkpointed_layers", 0) if automatic else recipe
    asked = resolved(recipe.train.tokens_per_pass)
    found = predict(recipe)
    smaller = recipe
    while True:
        best, forecast = _fewest_layers(smaller, predict) if automatic else (smaller, predict(smaller))
        tokens = resolved(best.train.tokens_per_pass)
        if _easily(forecast) or not free_tokens or tokens <= max(longest, SMALLEST_PASS):
            break
        smaller = _with(recipe, "train.tokens_per_pass", max(longest, SMALLEST_PASS, tokens // 2))
    choices = []
    if free_tokens and tokens != asked:
        reason = f"{asked:,} would need {gib(found.memory.total)} of {gib(found.device.room)}; the update is the same"
        choices.append(Choice("train.tokens_per_pass", tokens, reason))
    if automatic:
        choices.append(_layers_choice(best, found, forecast))
    return best, choices, forecast


def fill_card(recipe: Recipe, predict: Predict, *, tokens: int) -> tuple[Recipe, list[Choice]]:
    """The recipe with micro-batches of `tokens`, or of half as many and so on, as far as they fit easily without more
    layers computed twice; as it is if none of them fit."""
    usual = resolved(recipe.train.tokens_per_pass)
    layers = 0 if recipe.train.checkpointed_layers == "auto" else recipe.train.checkpointed_layers
    while tokens > usual:
        larger = _with(recipe, "train.tokens_per_pass", tokens)
        if _easily(predict(_with(larger, "train.checkpointed_layers", layers))):
            reason = "so many that starting operations takes at most a third of the time, as far as memory allows"
            return larger, [Choice("train.tokens_per_pass", tokens, reason)]
        tokens //= 2
    return recipe, []


def _layers_choice(recipe: Recipe, without: Forecast, forecast: Forecast) -> Choice:
    layers = recipe.train.checkpointed_layers
    need, room = gib(without.memory.total), gib(without.device.room)
    if layers == 0:
        reason = f"{gib(forecast.memory.total)} of {room} are needed: nothing has to be computed twice"
    else:
        reason = f"without, {need} of {room} would be needed; of {forecast.num_layers} layers no more than it takes"
    return Choice("train.checkpointed_layers", layers, reason)


def _fewest_layers(recipe: Recipe, predict: Predict) -> tuple[Recipe, Forecast]:
    """Recompute as few layers as fit easily; all if that is not enough, none if it makes no difference."""
    plain = predict(recipe)
    if _easily(plain) or not plain.num_layers:
        return recipe, plain
    most = _with(recipe, "train.checkpointed_layers", plain.num_layers)
    all_of_them = predict(most)
    if all_of_them.memory.total >= plain.memory.total:
        return recipe, plain
    if not _easily(all_of_them):
        return most, all_of_them
    low, high = 0, plain.num_layers  # low does not fit, high does
    while high - low > 1:
        middle = (low + high) // 2
        if _easily(predict(_with(recipe, "train.checkpointed_layers", middle))):
            high = middle
        else:
            low = middle
    best = _with(recipe, "train.checkpointed_layers", high)
    return best, predict(best)


def _easily(forecast: Forecast) -> bool:
    return forecast.memory.total <= (1 - MARGIN) * forecast.device.room


def refuse(recipe: Recipe, forecast: Forecast, predict: Predict, *, longest: int) -> DoesNotFitError:
    """Refusal of a run that does not fit: its needs, and the nearest plans that do."""
    found = nearest(recipe, predict, longest=longest)
    parts = ", ".join(f"{name} {gib(size)}" for name, size in forecast.memory.parts().items() if size)
    lines = [
        f"memory: this run needs {gib(forecast.memory.total)}, and {gib(forecast.device.room)} are there ({parts}).",
        "These would fit:" if found else "Nothing that is known would make it fit: take a smaller model.",
        *(f"  {alternative.words()}" for alternative in found),
        "To run it all the same: --set memory=warn",
    ]
    return DoesNotFitError("\n".join(lines), needed=forecast.memory.total, room=forecast.device.room)


def nearest(recipe: Recipe, predict: Predict, *, longest: int) -> list[Alternative]:
    """At most three plans that fit, those that change least first, and none that changes more than one of them."""
    found: list[Alternative] = []
    seen: list[frozenset[str]] = []
    for change in _changes(recipe, predict(recipe).num_layers, longest):
        keys = frozenset(f"{key}={value}" if key.startswith("method") else key for key, value in change.items())
        if any(keys >= fewer for fewer in seen):
            continue
        other = recipe
        try:
            for key, value in change.items():
                other = _with(other, key, _METHODS[value] if key == "method" else value)
            forecast = predict(other)
        except TunesmithError:  # a setting that this model or machine does not take
            continue
        if forecast.fits:
            package = METHODS[other.method.name].package
            needs = install_command(package) if package and find_spec(package) is None else ""
            settings = tuple(f"{key}={value}" for key, value in change.items())
            found.append(Alternative(settings, forecast.memory.total, needs))
            seen.append(keys)
        if len(found) == MOST_ALTERNATIVES:
            break
    return found


def _changes(recipe: Recipe, num_layers: int, longest: int) -> Iterator[dict[str, Any]]:
    least = max(longest, SMALLEST_PASS)
    tokens = resolved(recipe.train.tokens_per_pass)
    for fewer in sorted({max(least, tokens // 2), max(least, tokens // 4), least}, reverse=True):
        if fewer < tokens:
            yield {"train.tokens_per_pass": fewer}
    for layers in (num_layers // 2, num_layers):
        if layers > resolved(recipe.train.checkpointed_layers):
            yield {"train.checkpointed_layers": layers}
    smallest = {"train.tokens_per_pass": min(least, tokens), "train.checkpointed_layers": num_layers}
    yield smallest
    if recipe.precision == "float32":
        yield {"precision": "bfloat16"}
        yield {"precision": "bfloat16", **smallest}
    method = METHODS[recipe.method.name]
    if method.quantizes:
        return
    # A method of low rank keeps its rank and targets.
    methods = [{"method.name": "qlora"}] if method.low_rank else [{"method": "lora"}, {"method": "qlora"}]
    for other in methods:
        yield other
        yield {**other, **smallest}
        yield {**other, "precision": "bfloat16", **smallest}


_METHODS: dict[str, LoraMethod | QloraMethod] = {"lora": LoraMethod(), "qlora": QloraMethod()}
"""By the word that stands for all of one in a setting."""


def _with(recipe: Recipe, key: str, value: object) -> Recipe:
    return with_choice(recipe, Choice(key, value, ""))


ELEMENTWISE = ("adamw", "lion")
"""Optimizers that update each number by itself, so that a piece of a weight is updated as the whole is."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def why_whole(recipe: Recipe, located: ModelRef, kind: ModelKind) -> str:
    """Why every device has to hold the whole model, by the option that is in the way; empty: its layers can be split.

    `recipe`: with its task and method decided.
    """
    return next(_reasons(recipe, located, kind), "")


def refuse_shard(recipe: Recipe, located: ModelRef, kind: ModelKind) -> None:
    """Raise RecipeError where the recipe wants layers split that cannot be."""
    if recipe.shard is True and (reason := why_whole(recipe, located, kind)):
        raise RecipeError(f"shard: true: not with {reason}. Change that, or leave shard out.")


def split_choice(recipe: Recipe, *, needed: str, room: str) -> Choice:
    """The choice to split the layers, where a whole model does not fit."""
    reason = f"a whole model on each device would need {needed} of {room}: the layers' weights are split over"
    return Choice("shard", True, f"{reason} {resolved(recipe.devices)}")


def _reasons(recipe: Recipe, located: ModelRef, kind: ModelKind) -> Iterator[str]:
    method: Any = recipe.method
    if recipe.devices in ("auto", 1):
        yield "devices: 1, which leaves nothing to split over"
    if located.is_gguf:
        yield f"model: {recipe.model}: a .gguf file is read whole"
    if kind == "encoder_decoder":
        yield f"model: {recipe.model}: it has an encoder and a decoder"
    if METHODS[method.name].quantizes:
        yield f"method.name: {method.name}: packed weights cannot be split"
    if method.name not in ("lora", "full"):
        yield f"method.name: {method.name}: it reads whole weights; lora and full do not"
    if TASKS[resolved(recipe.task)].compares:
        yield f"task: {recipe.task}: one process computes what the model was before"
    if has_look(recipe):
        yield f"task: {recipe.task}: the rows of a step are looked at in passes of their own"
    if recipe.precision == "float16":
        yield "precision: float16: a step that overflows is made again, which every device would have to know"
    if method.name == "lora" and method.also_train:
        yield "method.also_train: weights in the layers would be trained whole"
    if method.name == "full":
        yield from _reasons_of_full(recipe, located)


def _reasons_of_full(recipe: Recipe, located: ModelRef) -> Iterator[str]:
    if recipe.optim.name not in ELEMENTWISE:
        yield f"optim.name: {recipe.optim.name}: it looks at whole matrices; {', '.join(ELEMENTWISE)} do not"
    config = load.load_config(located).get_text_config()
    if any(getattr(config, name, None) for name in _EXPERTS):
        yield "method.name: full: devices whose tokens choose other experts would wait for each other"
