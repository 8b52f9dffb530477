"""The layers and modules that the words of a recipe mean, in a model.

A word is the end of a name (`q_proj`, `mlp.down_proj`), or `re:` and a regular expression to
search names. Products of experts, which a mixture keeps in one tensor each, are meant only by
words that have `experts` in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.experts import ExpertMatrix, expert_layers, put_expert_layer
from tunesmith.models.heads import new_head_names, new_param_names
from tunesmith.models.modes import text_part
from tunesmith.models.quantized import QuantizedLinear
from tunesmith.models.quantized_experts import QuantizedExperts
from tunesmith.models.vision import part_modules
from tunesmith.phrases import did_you_mean

LINEARS = (nn.Linear, Conv1D, QuantizedLinear)
PLAIN_FORWARDS = (nn.Linear.forward, Conv1D.forward, QuantizedLinear.forward)
"""Forwards that are x Wᵀ + b and nothing else."""
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)
GROUPS = ("all-linear", "attention", "mlp")
SEEING = ("vision", "projector")
"""Words for the parts of a model that sees, which no other word means."""
EXPERTS = "experts"
"""The word for the products of all experts, and part of every word that means some of them."""
EXPERT_LAYERS = (ExpertMatrix, QuantizedExperts)
MAX_REPEATS = 4
MAX_PATHS = 2_000
MOST_PATTERN_CHARS = 1_000

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_LAYER_INDEX = re.compile(r"(^|\.)\d+\.")
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
"""An escape or a set: one character, whatever is written in it."""
_OPENING = re.compile(r"\(\?(?::|<?[=!]|P<\w+>)")
_PART = re.compile(r"[()|]|[*+?]\??|\{(?:[\d,]*\}\??)?")
"""Brackets, alternatives and repeats, each with its mark for as few as possible."""
_REPEATED = re.compile(r"\)[*+{]|\{\d*,?\d{4}")
"""A group, or anything a thousand times."""


@dataclass(frozen=True, slots=True)
class Target:
    """One linear layer, or one product of all experts, and every name that reaches
    it; the first is its name."""

    names: tuple[str, ...]
    module: nn.Module

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def is_of_experts(self) -> bool:
        return isinstance(self.module, EXPERT_LAYERS)

    @property
    def weight_name(self) -> str:
        """The name of its weight in a plain model: a product of experts is the tensor itself."""
        return self.name if self.is_of_experts else f"{self.name}.weight"


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[Target]:
    """The linear layers that `targets` mean, each once, in the order of the model, and behind them products of
    experts. Layers of a head, which is trained whole, are not among them, nor `unread_linears`.

    Besides names, a word is `all-linear` (every linear layer inside the decoder layers but `is_router`),
    `attention` (those inside an attention module), `mlp` (the others) or `experts` (every product of experts);
    of a model that sees these are of its language part, and `vision` and `projector` mean the other parts.

    Raises:
        RecipeError: a word for no layer, an embedding, or a layer that shares its weight (a tied output head).
    """
    head = {name.rpartition(".")[0] for name in new_head_names(model)}
    unread = {id(target.module) for target in unread_linears(model)}
    linears = [
        linear for linear in _named(model, LINEARS) if linear.name not in head and id(linear.module) not in unread
    ]
    in_head = [target for target in _named(model, LINEARS) if target.name in head]
    experts = expert_targets(model)
    linears += experts
    embeddings = _named(model, (nn.Embedding,))
    problems: list[str] = []
    chosen: set[int] = set()
    for word in targets:
        check_word(word, "method.targets")
        if word in SEEING:
            inside = part_modules(model).get(word, [])
            of_part = [linear for linear in _named(model, LINEARS) if is_inside(linear.name, inside)]
            problems += [] if of_part else [f"method.targets: {word!r}: this model has no such part. Leave it out."]
            chosen.update(id(target.module) for target in of_part)
            continue
        meant = [target for target in linears if _is_meant(word, target, model)]
        chosen.update(id(target.module) for target in meant)
        problems += [f"method.targets: {word!r}: {reason}" for reason in tied_reasons(model, meant)]
        unfit = [target for target in embeddings if word not in GROUPS and _is_meant(word, target, model)]
        problems += [
            f"method.targets: {word!r}: {target.name} is an embedding, only linear layers can be adapted. "
            "Leave it out, or train every weight with method: full."
            for target in unfit
        ]
        if not meant and (of_head := [target.name for target in in_head if _is_meant(word, target, model)]):
            problems.append(
                f"method.targets: {word!r}: {of_head[0]} belongs to the head, which is trained whole. Leave it out."
            )
        elif not meant and not unfit:
            reason = _why_nothing(word, model)
            hint = near_words(word, map(_hinted, linears), *GROUPS)
            problems.append(f"method.targets: {word!r} {reason}{hint}")
    if problems:
        raise RecipeError("\n".join(problems))
    return [target for target in (*_named(model, LINEARS), *experts) if id(target.module) in chosen]


def expert_targets(model: nn.Module) -> list[Target]:
    """Every product of experts that can have adapters, in the order of the model."""
    return [Target((name,), layer) for name, layer in expert_layers(model).items()]


def _why_nothing(word: str, model: nn.Module) -> str:
    """The reason why a word means no layer."""
    others = not_linear(model)
    unknown = next((name for name in others if "expert" in type(model.get_submodule(name)).__name__.lower()), None)
    if word != EXPERTS:
        why = f" ({others[0]} and its like hold weights, but are not linear layers.)" if others else ""
        return f"matches no linear layer.{why}"
    if unknown is not None:
        kind = type(model.get_submodule(unknown)).__name__
        return (
            f"is not possible here: {unknown} ({kind}) computes in a way that adapters here do not follow. Leave "
            "experts out: the other layers are adapted, or train every weight with method: full."
        )
    if any(".experts." in f".{target.name}" for target in _named(model, LINEARS)):
        return "means nothing more here: the experts of this model are linear layers, which all-linear adapts."
    return "means nothing here: this model is no mixture of experts. Leave it out."


def inner_linears(model: nn.Module, *, unread: bool = True) -> list[Target]:
    """Every linear layer inside the decoder and encoder layers, without a head that is trained whole. `unread`:
    with `unread_linears`."""
    head = {name.rpartition(".")[0] for name in new_head_names(model)}
    others = {id(target.module) for target in unread_linears(model)} if not unread else set()
    linears = [
        linear for linear in _named(model, LINEARS) if linear.name not in head and id(linear.module) not in others
    ]
    return [target for target in linears if _place(target, model) is not None]


def routers(model: nn.Module) -> list[Target]:
    """The layers inside the decoder layers that `is_router`: no group of words means them."""
    return [target for target in inner_linears(model, unread=False) if is_router(model, target.name)]


def unread_linears(model: nn.Module) -> list[Target]:
    """The linear layers that only images or sound pass through."""
    read = {id(module) for module in text_part(model).modules()}
    return [linear for linear in _named(getattr(model, "base_model", model), LINEARS) if id(linear.module) not in read]


def named_targets(model: nn.Module, names: Iterable[str]) -> list[Target]:
    """The linear layers of exactly these names, in the order of the model; other names are ignored."""
    wanted = set(names)
    return [target for target in _named(model, LINEARS) if wanted & set(target.names)]


def by_pattern(
    model: nn.Module, targets: Sequence[Target], patterns: Mapping[str, float], *, option: str
) -> dict[str, float]:
    """Values for `targets` by their names; of several patterns that mean one, the last counts.

    Raises RecipeError for a pattern that means no adapted layer.
    """
    values: dict[str, float] = {}
    for word, value in patterns.items():
        check_word(word, option)
        matching = [target.name for target in targets if _is_meant(word, target, model)]
        if not matching:
            hint = near_words(word, map(_hinted, targets))
            raise RecipeError(f"{option}: {word!r} matches no adapted layer.{hint}")
        values |= dict.fromkeys(matching, value)
    return values


def tied_reasons(model: nn.Module, targets: Sequence[Target]) -> list[str]:
    """Reasons against adapting some of `targets`, one for each whose weight belongs to another module too."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons = []
    for target in targets:
        owned = (name for weight in target.module.parameters() for name in owners[id(weight)])
        at_home = {*target.names, *(name.rpartition(".")[0] for name in target.names if target.is_of_experts)}
        if other := next((name for name in owned if name not in at_home), None):
            reasons.append(
                f"{target.name} and {other} are one weight (tied): after a merge {other} would change too, "
                "so the merged model could not do what the adapter did. Leave it out."
            )
    return reasons


def not_linear(model: nn.Module) -> list[str]:
    """Modules inside numbered layers that hold matrices and are not linear layers, such as fused experts."""
    return [
        name
        for name, module in model.named_modules()
        if _LAYER_INDEX.search(name)
        and not (_is_linear(module) or isinstance(module, nn.Embedding))
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    ]


def replace_module(model: nn.Module, target: Target, module: nn.Module) -> None:
    """Put `module` in the place of `target`, under every one of its names."""
    for name in target.names:
        if target.is_of_experts:
            put_expert_layer(model, name, module)
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def refuse_frozen_new(model: PreTrainedModel, where: str) -> None:
    """Raise RecipeError if the model has new, random weights outside a head, which adapters leave frozen."""
    head = new_head_names(model)
    if drawn := [name for name in new_param_names(model) if name not in head]:
        raise RecipeError(
            f"{where}: {drawn[0]} is new, and under an adapter it would stay the random numbers "
            "that it is. Use method: full, or a model whose masked-language head comes with it."
        )


# Modules that are trained whole


def find_modules(model: nn.Module, words: Sequence[str], targets: Sequence[Target]) -> tuple[str, ...]:
    """The modules that `words` mean, each once and none inside another, in the order of the model.

    Raises:
        RecipeError: a word that means no module with weights, or one that is adapted or belongs to a head.
    """
    head = new_head_names(model)
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    adapted = {name for target in targets for name in target.names}
    problems: list[str] = []
    chosen: set[str] = set()
    for word in words:
        check_word(word, "method.also_train")
        parts = part_modules(model) if word in SEEING else {}
        matching = parts.get(word) or [name for name in names if means(word, name)]
        if not matching:
            problems.append(f"method.also_train: {word!r} matches no module with weights.{near_words(word, names)}")
        for name in matching:
            if inside := [other for other in adapted if is_inside(other, [name])]:
                problems.append(
                    f"method.also_train: {word!r}: {min(inside)} has an adapter: a layer is adapted or trained "
                    "whole, not both. Leave it out here or in method.targets."
                )
            elif any(weight.startswith(f"{name}.") for weight in head):
                problems.append(
                    f"method.also_train: {word!r}: {name} belongs to the head, which is trained whole anyway. "
                    "Leave it out."
                )
        chosen.update(matching)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return tuple(name for name in names if name in chosen and not is_inside(name, chosen - {name}))


def weights_of(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of `modules` by their names in the model; a tied one under the first."""
    names: dict[nn.Parameter, str] = {}
    for module in modules:
        for name, parameter in model.get_submodule(module).named_parameters():
            names.setdefault(parameter, f"{module}.{name}")
    return {name: parameter for parameter, name in names.items()}


def tied_modules(model: nn.Module, modules: Sequence[str]) -> dict[str, str]:
    """The other modules that hold a weight of `modules`, each with the name of the one it shares it with."""
    weights = {parameter: name.rpartition(".")[0] for name, parameter in weights_of(model, modules).items()}
    tied: dict[str, str] = {}
    for name, module in model.named_modules():
        shared = [weights[weight] for weight in module.parameters(recurse=False) if weight in weights]
        if shared and not is_inside(name, modules):
            tied[name] = shared[0]
    return tied


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is one of `modules` or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


# Words


def means(word: str, name: str) -> bool:
    """Whether a word means a name."""
    if word.startswith("re:"):
        return matches(word[3:], name)
    return name == word or name.endswith(f".{word}")


def near_words(word: str, names: Iterable[str], *groups: str) -> str:
    """A hint for a word that means nothing: a similar one, and the ends of names that exist."""
    ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    known = [other for other in (*groups, *ends) if other != word]
    return f"{did_you_mean(word, known)} There are: {', '.join(known)}."


def _hinted(target: Target) -> str:
    """The name that a hint makes a word of: the ends of tensors of experts mean nothing by themselves."""
    return EXPERTS if target.is_of_experts else target.name


def matches(pattern: str, name: str, *, whole: bool = False) -> bool:
    """Whether a regular expression is found in a name, or with `whole` is all of it. See `check_expression`."""
    check_expression(pattern)
    return (re.fullmatch if whole else re.search)(pattern, name) is not None


def check_word(word: str, option: str) -> None:
    """Raise RecipeError for a word of an option that has no usable regular expression after `re:`."""
    if word.startswith("re:") and (problem := _problem(word[3:])):
        raise RecipeError(f"{option}: {word[:80]!r}: {problem}")


def check_expression(pattern: str) -> None:
    """Raise ModelError for a regular expression that is none or may take forever: adapters are strangers'
    files."""
    if problem := _problem(pattern):
        raise ModelError(f"{pattern[:80]!r}: {problem}")


@lru_cache
def _problem(pattern: str) -> str:
    """The reason against a regular expression; empty: none. Time is exponential in the repeats of a group and
    in the number of groups with alternatives, and polynomial in the number of repeats."""
    instead = "List the names of the modules instead."
    if len(pattern) > MOST_PATTERN_CHARS:
        return (
            f"this regular expression could take forever: it has more than {MOST_PATTERN_CHARS:,} characters. {instead}"
        )
    plain = _OPENING.sub("(", _LITERAL.sub("x", pattern))
    if "(?" in plain:
        return f"this regular expression has flags or a condition after (?, which are not allowed. {instead}"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"this is not a regular expression: {error}. {instead}"
    repeats, paths = _size(plain)
    if repeats > MAX_REPEATS or paths > MAX_PATHS or _REPEATED.search(plain):
        return (
            f"this regular expression could take forever: it repeats a group, or has more than {MAX_REPEATS} "
            f"repeats or {MAX_PATHS:,} combinations of alternatives. {instead}"
        )
    return ""


def _size(plain: str) -> tuple[int, int]:
    """The most repeats on a path through the alternatives of an expression, and the number of such paths."""
    groups = [(0, 0, 0, 1)]  # repeats and paths of the alternatives that are read, and of the current one
    for part in _PART.findall(plain):
        if part == "(":
            groups.append((0, 0, 0, 1))
            continue
        most, total, repeats, paths = groups.pop()
        if part not in ("|", ")"):
            groups.append((most, total, repeats + 1, paths))
            continue
        most, total = max(most, repeats), total + paths
        if part == ")":
            outer = groups.pop()
            groups.append((*outer[:2], outer[2] + most, outer[3] * total))
        else:
            groups.append((most, total, 0, 1))
    most, total, repeats, paths = groups[0]
    return max(most, repeats), total + paths


def _named(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Target]:
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kinds) and (kinds is not LINEARS or _is_linear(module)):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    return [Target(tuple(names[key]), modules[key]) for key in modules]


_LINEAR_BY_ANSWER: set[type[nn.Module]] = set()
"""Classes that were found to be linear: a product with each weight of a large Falcon takes seconds."""


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer; one that computes in its own way, as Falcon's layers and routers of
    experts, by what it answers."""
    if not isinstance(module, LINEARS) or type(module).forward in PLAIN_FORWARDS or type(module) in _LINEAR_BY_ANSWER:
        return isinstance(module, LINEARS)
    with suppress(Exception):  # of a foreign model
        rows, columns = module.weight.shape
        answer = module(module.weight.new_zeros(1, columns))
        if isinstance(answer, Tensor) and answer.shape == (1, rows):
            _LINEAR_BY_ANSWER.add(type(module))
            return True
    return False


def is_router(model: nn.Module, name: str) -> bool:
    """Whether a linear layer chooses experts, or how much of one counts: its outputs decide where a token goes,
    and a low-rank change of them moves all that the experts were trained for. Servers read no adapter there.

    Known by its place: near experts, with as many outputs as there are or one, and no other layer in between.
    Experts are a tensor [experts, …] that is no convolution, or a list of modules with linear layers. Or by the
    name or class of what it is part of: the router of Zaya is a small network.
    """
    index = _LAYER_INDEX.search(name)
    start, inside = name[: index.end() if index else 0], name[index.end() :].split(".") if index else []
    holders = [model.get_submodule(start + ".".join(inside[:depth])) for depth in range(1, len(inside) + 1)]
    names = (*inside, *(type(holder).__name__.lower() for holder in holders))
    if any("router" in part for part in names):
        return True
    outputs, _ = shape_OI(model.get_submodule(name))
    for holder, key in zip(holders[-2::-1], inside[:0:-1], strict=True):
        branch = getattr(holder, key)
        if len(list(islice((part for part in branch.modules() if isinstance(part, LINEARS)), 2))) > 1:
            return False
        siblings = [part for other, part in holder.named_children() if other != key]
        counts = {count for part in siblings for count in _expert_counts(part)}
        if counts and outputs in (1, *counts):
            return True
    return False


def shape_OI(linear: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    if isinstance(linear, QuantizedLinear):
        return linear.shape_OI
    rows, columns = linear.weight.shape  # type: ignore[misc]
    return (columns, rows) if isinstance(linear, Conv1D) else (rows, columns)


def _expert_counts(module: nn.Module) -> set[int]:
    """Numbers of experts that a module may hold; empty: it holds none."""
    counts = {
        parameter.shape[0]
        for inner in module.modules()
        if not isinstance(inner, _CONVOLUTIONS)
        for parameter in inner.parameters(recurse=False)
        if parameter.ndim == 3
    }
    counts |= {inner.shape_EOI[0] for inner in module.modules() if isinstance(inner, QuantizedExperts)}
    lists = [inner for inner in module.modules() if isinstance(inner, nn.ModuleList) and len(inner) > 1]
    with_linears = (inner for inner in lists if any(isinstance(part, LINEARS) for part in inner.modules()))
    return counts | set(map(len, with_linears))


def _is_meant(word: str, target: Target, model: nn.Module) -> bool:
    if target.is_of_experts:
        module = target.name.rpartition(".")[0]
        return word == EXPERTS or (EXPERTS in word and (means(word, target.name) or means(word, module)))
    if word not in GROUPS:
        return any(means(word, name) for name in target.names)
    inside = _place(target, model)
    if inside is None or is_router(model, target.name):
        return False
    return word == "all-linear" or (word == "attention") == bool(_ATTENTION.search(inside))


def _place(target: Target, model: nn.Module) -> str | None:
    """The name of a linear layer inside its decoder layer; None for the output head and what is outside."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    index = _LAYER_INDEX.search(target.name)
    return None if target.module is head or index is None else target.name[index.end() :]
