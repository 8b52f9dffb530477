"""Which layers a method adapts: from the words of a recipe to modules of a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import RecipeError
from tunesmith.methods.patterns import searches
from tunesmith.models.heads import new_head_names
from tunesmith.models.quantized import QuantizedLinear

LINEARS = (nn.Linear, Conv1D, QuantizedLinear)
GROUPS = ("all-linear", "attention", "mlp")

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_LAYER_INDEX = re.compile(r"(^|\.)\d+\.")


@dataclass(frozen=True, slots=True)
class Target:
    """One linear layer and every name that reaches it; the first is its name."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        return self.names[0]


def find_targets(model: nn.Module, targets: Sequence[str], *, layers: Sequence[str] = ()) -> list[Target]:
    """The layers that `targets` mean, each once, in the order of the model; of those in numbered layers only the ones
    that `layers` mean, if any are given.

    A word is a group (`all-linear`: every linear layer inside the decoder layers, `attention`, `mlp`: those of them
    inside an attention module, and the others), the end of a module's name (`q_proj`, `mlp.down_proj`), or `re:` and a
    regular expression searched for in whole module names. Layers of a head that is trained whole are not among them.
    A word of `layers` is `last:4`, `first:4`, `7` or `0-3`, counted from 0 in each stack of layers.

    Raises:
        RecipeError: a word that means no layer, an embedding, or a layer that shares its weight (a tied output head).
    """
    whole = {name.rpartition(".")[0] for name in new_head_names(model)}
    heads = [target for target in _named(model, LINEARS) if target.name in whole]
    linears = [target for target in _named(model, LINEARS) if target.name not in whole]
    embeddings = _named(model, (nn.Embedding,))
    problems: list[str] = []
    chosen: set[int] = set()
    for word in targets:
        found = [target for target in linears if _means(word, target, model)]
        chosen.update(id(target.module) for target in found)
        problems += [f"method.targets: {word!r}: {reason}" for reason in shared_weights(model, found)]
        unfit = [target for target in embeddings if word not in GROUPS and _means(word, target, model)]
        problems += [
            f"method.targets: {word!r}: {target.name} is an embedding, only linear layers can be adapted. "
            "Leave it out, or train every weight with method: full."
            for target in unfit
        ]
        if not found and (in_head := [target.name for target in heads if _means(word, target, model)]):
            problems.append(
                f"method.targets: {word!r}: {in_head[0]} belongs to the head, which is trained whole. Leave it out."
            )
        elif not found and not unfit:
            problems.append(_no_match(word, linears, not_linear(model)))
    if problems:
        raise RecipeError("\n".join(problems))
    found = [target for target in linears if id(target.module) in chosen]
    return in_layers(model, found, layers) if layers else found


def inner_linears(model: nn.Module) -> list[Target]:
    """Every linear layer inside the decoder and encoder layers, but those of a head that is trained whole."""
    whole = {name.rpartition(".")[0] for name in new_head_names(model)}
    linears = _named(model, LINEARS)
    return [target for target in linears if target.name not in whole and _means("all-linear", target, model)]


def in_layers(model: nn.Module, targets: Sequence[Target], words: Sequence[str]) -> list[Target]:
    """Those of `targets` that stand in no numbered layer or in one that a word means.

    Raises RecipeError for a word that means no layer with a target.
    """
    counts = layer_counts(model)
    meant = {word: [t.name for t in targets if is_in_layers(word, t.name, counts)] for word in words}
    if empty := [word for word, found in meant.items() if not found]:
        sizes = ", ".join(f"{stack} has {count}" for stack, count in counts.items()) or "there are none"
        raise RecipeError(f"method.layers: {empty[0]!r} means no layer with a target; counted from 0, {sizes}.")
    kept = {name for found in meant.values() for name in found}
    return [target for target in targets if target.name in kept or layer_of(target.name) is None]


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers and the number in it that a module's name tells: model.layers.3.mlp is (model.layers, 3)."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else (name[: found.start()], int(found.group(1)))


def layer_counts(model: nn.Module) -> dict[str, int]:
    """How many layers each stack has."""
    counts: dict[str, int] = {}
    for name, _ in model.named_modules():
        if (place := layer_of(name)) is not None:
            counts[place[0]] = max(counts.get(place[0], 0), place[1] + 1)
    return counts


def is_in_layers(word: str, name: str, counts: Mapping[str, int]) -> bool:
    """Whether last:4, first:4, 7 or 0-3 means the layer that a name tells; `counts` as `layer_counts` gives them."""
    place = layer_of(name)
    if place is None:
        return False
    stack, number = place
    kind, _, many = word.partition(":")
    if kind == "last":
        return int(many) <= counts[stack] and number >= counts[stack] - int(many)
    if kind == "first":
        return int(many) <= counts[stack] and number < int(many)
    first, _, last = word.partition("-")
    return int(first) <= number <= int(last or first)


def by_pattern(
    model: nn.Module, targets: Sequence[Target], patterns: Mapping[str, float], *, option: str
) -> dict[str, float]:
    """The value that `patterns` give each of `targets` by its name; of several that mean it, the last.

    Raises RecipeError for a pattern that means no adapted layer.
    """
    values: dict[str, float] = {}
    for word, value in patterns.items():
        found = [target.name for target in targets if _means(word, target, model)]
        if not found:
            names = [target.name for target in targets]
            raise RecipeError(f"{option}: {word!r} matches no adapted layer.{near_words(word, names)}")
        values |= dict.fromkeys(found, value)
    return values


def near_words(word: str, names: Sequence[str]) -> str:
    """A suggestion for a word that is the end of no name, and the ends that there are."""
    ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    near = difflib.get_close_matches(word, ends, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"{meant} There are: {', '.join(ends)}."


def shared_weights(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Why some of `targets` cannot be adapted: a reason for each whose weight belongs to another module too."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons = []
    for target in targets:
        owned = (name for weight in target.module.parameters() for name in owners[id(weight)])
        others = [name for name in owned if name not in target.names]
        if others:
            reasons.append(
                f"{target.name} and {others[0]} are one weight (tied): after a merge {others[0]} would change too, "
                "so the merged model could not do what the adapter did. Leave it out."
            )
    return reasons


def not_linear(model: nn.Module) -> list[str]:
    """Modules of the decoder layers that hold matrices and are no linear layers, such as fused experts."""
    return [
        name
        for name, module in model.named_modules()
        if _LAYER_INDEX.search(name)
        and not isinstance(module, (*LINEARS, nn.Embedding))
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    ]


def named_targets(model: nn.Module, names: Sequence[str]) -> list[Target]:
    """The linear layers of exactly these names, in the order of the model; names of anything else are left out."""
    wanted = set(names)
    return [target for target in _named(model, LINEARS) if wanted & set(target.names)]


def replace_module(model: nn.Module, target: Target, module: nn.Module) -> None:
    """Put `module` in the place of `target`, under every one of its names."""
    for name in target.names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _named(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Target]:
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return [Target(tuple(names[key]), modules[key]) for key in modules]


def _means(word: str, target: Target, model: nn.Module) -> bool:
    if word in GROUPS:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        index = _LAYER_INDEX.search(target.name)
        if target.module is head or index is None:
            return False
        return word == "all-linear" or (word == "attention") == bool(_ATTENTION.search(target.name[index.end() :]))
    if word.startswith("re:"):
        return any(searches(word[3:], name) for name in target.names)
    return any(name == word or name.endswith("." + word) for name in target.names)


def _no_match(word: str, linears: Sequence[Target], no_linears: Sequence[str]) -> str:
    ends = sorted({target.name.rpartition(".")[2] for target in linears})
    known = [other for other in (*GROUPS, *ends) if other != word]
    near = difflib.get_close_matches(word, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    why = f" ({no_linears[0]} and its like hold weights, but are not linear layers.)" if no_linears else ""
    return f"method.targets: {word!r} matches no linear layer.{why}{meant} There are: {', '.join(known)}."
