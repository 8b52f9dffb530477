"""Make a run fit into memory: as many layers recomputed and passes as small as it takes, or layers split over
devices; or say what else would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tunesmith.errors import DoesNotFitError, RecipeError, TunesmithError
from tunesmith.methods import METHODS
from tunesmith.methods.targets import EXPERTS
from tunesmith.models import load
from tunesmith.models.resolve_model import ModelRef
from tunesmith.phrases import set_words
from tunesmith.planning.decisions import with_options
from tunesmith.planning.forecast import Forecast
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS, has_prepass
from tunesmith.types import Choice, JsonObject, ModelKind

MARGIN = 0.08
"""Share of the memory that automatic choices leave free: what a forecast by formula may be off."""
PARTS = 8
"""Parts of the layers that are recomputed, one more at a time."""
MOST_ALTERNATIVES = 3
SMALLEST_PASS = 128
"""Tokens: below, passes get slow without getting smaller."""

Predict = Callable[[Recipe], Forecast]


def gib(num_bytes: float) -> str:
    """Bytes as a person reads them: 3.41 GiB."""
    return f"{num_bytes / 2**30:.2f} GiB"


def with_fewer_streams(recipe: Recipe, predict: Predict) -> tuple[Recipe, list[Choice]]:
    """The recipe with as many answers decoded together as there is memory for, as long as fewer take less: of one
    prompt at least. Their number changes answers by rounding alone."""
    streams, forecast = resolved(recipe.reinforce.streams), predict(recipe)
    best, first = recipe, forecast.memory.total
    while forecast.memory.total > (1 - MARGIN) * forecast.device.room and streams > recipe.reinforce.samples:
        fewer = max(recipe.reinforce.samples, streams // 2)
        changed = with_options(recipe, {"reinforce.streams": fewer})
        smaller = predict(changed)
        if smaller.memory.total >= forecast.memory.total:  # something else takes the most
            break
        best, forecast, streams = changed, smaller, fewer
    if best is recipe:
        return recipe, []
    room, wanted = gib(forecast.device.room), resolved(recipe.reinforce.streams)
    reason = f"{wanted:,} would need {gib(first)} of {room}; the answers are the same but for rounding"
    return best, [Choice("reinforce.streams", streams, reason)]


def fit(recipe: Recipe, predict: Predict, *, longest: int, free_tokens: bool) -> tuple[Recipe, list[Choice], Forecast]:
    """The recipe with `train.checkpointed_layers` decided, and with `free_tokens` smaller passes if need be.

    What was set is left as it is, whether it fits or not.
    """
    automatic = recipe.train.checkpointed_layers == "auto"
    wanted_tokens = resolved(recipe.train.tokens_per_pass)
    as_wanted = predict(recipe)
    num, room = as_wanted.sizes.recomputable, gib(as_wanted.device.room)
    by_parts = sorted({*range(0, num, max(1, num // PARTS)), num})
    numbers = by_parts if automatic else [recipe.train.checkpointed_layers]
    sizes, least = [wanted_tokens], max(longest, SMALLEST_PASS)
    while free_tokens and sizes[-1] > least:
        sizes.append(max(least, sizes[-1] // 2))
    for tokens, layers in ((tokens, layers) for tokens in sizes for layers in numbers):
        best = with_options(recipe, {"train.tokens_per_pass": tokens, "train.checkpointed_layers": layers})
        forecast = predict(best)
        if forecast.memory.total <= (1 - MARGIN) * forecast.device.room:
            break
    choices = []
    if tokens != wanted_tokens:
        reason = f"{wanted_tokens:,} would need {gib(as_wanted.memory.total)} of {room}; the update is the same"
        choices.append(Choice("train.tokens_per_pass", tokens, reason))
    if automatic:
        reason = f"{gib(forecast.memory.total)} of {room} are needed: nothing has to be computed twice"
        if layers:
            reason = f"without, {gib(as_wanted.memory.total)} of {room} would be needed; the model has {num} layers"
        choices.append(Choice("train.checkpointed_layers", layers, reason))
    return best, choices, forecast


def refuse(forecast: Forecast) -> DoesNotFitError:
    """Refusal of a run that does not fit: its needs, and `Forecast.alternatives`."""
    alternatives = [(set_words(change), total) for change, total in forecast.alternatives]
    parts = ", ".join(f"{name} {gib(size)}" for name, size in forecast.memory.parts().items() if size)
    lines = [
        f"memory: this run needs {gib(forecast.memory.total)}, and {gib(forecast.device.room)} are there ({parts}).",
        "These would fit:" if alternatives else "Nothing that is known would make it fit: take a smaller model.",
        *(f"  {settings}  ({gib(total)})" for settings, total in alternatives),
        "To run it all the same: --set memory=warn",
    ]
    return DoesNotFitError("\n".join(lines), needed=forecast.memory.total, room=forecast.device.room)


def nearest(recipe: Recipe, predict: Predict, *, longest: int) -> list[tuple[JsonObject, int]]:
    """At most three plans that fit, by the options that they change, with the bytes of each: those that change
    least first, and none that changes more than one of them."""
    alternatives: list[tuple[JsonObject, int]] = []
    seen: list[set[str]] = []
    for change in _changes(recipe, predict(recipe).sizes.recomputable, longest):
        keys = {f"{key}={value}" if key.startswith("method") else key for key, value in change.items()}
        if any(keys >= fewer for fewer in seen) or len(alternatives) == MOST_ALTERNATIVES:
            continue
        try:
            forecast = predict(with_options(recipe, change))
        except TunesmithError:  # a setting that this model or machine does not take
            continue
        if forecast.fits:
            alternatives.append((change, forecast.memory.total))
            seen.append(keys)
    return alternatives


def _changes(recipe: Recipe, num_layers: int, longest: int) -> Iterator[JsonObject]:
    tokens, method = resolved(recipe.train.tokens_per_pass), METHODS[recipe.method.name]
    least = min(tokens, max(longest, SMALLEST_PASS))
    smallest = {"train.tokens_per_pass": least, "train.checkpointed_layers": num_layers}
    narrow = {"precision": "bfloat16"} if recipe.precision == "float32" else {}
    if recipe.reinforce.grader is not None:
        yield {"reinforce.streams": recipe.reinforce.samples}
    yield {"train.tokens_per_pass": max(least, tokens // 4)}
    yield {"train.tokens_per_pass": least}
    yield {"train.checkpointed_layers": num_layers}
    yield smallest
    others: list[JsonObject] = [narrow] if narrow else []
    if not method.quantizes:  # one of low rank keeps its rank and targets
        others += [{"method.name": "qlora"}] if method.low_rank else [{"method": "lora"}, {"method": "qlora"}]
    for other in others:
        yield other
        yield {**other, **narrow, **smallest}


ELEMENTWISE = ("adamw", "lion")
"""Optimizers that update each number by itself, so that a piece of a weight is updated as the whole is."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def why_whole(recipe: Recipe, located: ModelRef, kind: ModelKind) -> str:
    """Why every device has to hold the whole model, by the option in the way; empty: layers can be split.

    `recipe`: with its task and method decided.
    """
    return next(_reasons(recipe, located, kind), "")


def refuse_shard(recipe: Recipe, located: ModelRef, kind: ModelKind) -> None:
    """Raise RecipeError where the recipe wants layers split that cannot be."""
    if recipe.shard is True and (reason := why_whole(recipe, located, kind)):
        raise RecipeError(f"shard: true: not with {reason}. Change that, or leave shard out.")


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
    if has_prepass(recipe) or recipe.distil.teacher is not None:
        yield f"task: {recipe.task}: the rows of a step are looked at, or drawn and read, in passes of their own"
    if recipe.precision == "float16":
        yield "precision: float16: a step that overflows is made again, which every device would have to know"
    if method.name == "lora" and method.also_train:
        yield "method.also_train: weights in the layers would be trained whole"
    if method.name == "lora" and any(EXPERTS in word for word in method.targets):
        yield "method.targets: experts: their adapters take the places of tensors in the layers"
    if method.name == "full" and recipe.optim.name not in ELEMENTWISE:
        yield f"optim.name: {recipe.optim.name}: it looks at whole matrices; {', '.join(ELEMENTWISE)} do not"
    if method.name == "full" and any(getattr(load.load_config(located).get_text_config(), key, 0) for key in _EXPERTS):
        yield "method.name: full: devices whose tokens choose other experts would wait for each other"
