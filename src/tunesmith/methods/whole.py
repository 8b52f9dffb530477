"""What is trained as it is beside adapters: modules that the recipe names, and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.methods.patterns import searches
from tunesmith.methods.targets import Target, near_words
from tunesmith.models.heads import new_head_names
from tunesmith.recipe.methods import Bias


def find_modules(model: nn.Module, words: Sequence[str], targets: Sequence[Target]) -> tuple[str, ...]:
    """The modules that `words` mean, each once and none inside another, in the order of the model.

    A word is the end of a module's name (`embed_tokens`, `model.norm`), or `re:` and a regular expression searched for
    in whole module names.

    Raises:
        RecipeError: a word that means no module with weights, or one that is adapted or belongs to a head.
    """
    head = new_head_names(model)
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    adapted = {name for target in targets for name in target.names}
    problems: list[str] = []
    chosen: set[str] = set()
    for word in words:
        found = [name for name in names if means(word, name)]
        if not found:
            problems.append(f"method.also_train: {word!r} matches no module with weights.{near_words(word, names)}")
        for name in found:
            inside = [other for other in adapted if other == name or other.startswith(f"{name}.")]
            if inside:
                problems.append(
                    f"method.also_train: {word!r}: {min(inside)} has an adapter: a layer is adapted or trained whole, "
                    "not both. Leave it out here or in method.targets."
                )
            elif any(weight.startswith(f"{name}.") for weight in head):
                problems.append(
                    f"method.also_train: {word!r}: {name} belongs to the head, which is trained whole anyway. "
                    "Leave it out."
                )
        chosen.update(found)
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    return tuple(name for name in names if name in chosen and not any(name.startswith(f"{other}.") for other in chosen))


def means(word: str, name: str) -> bool:
    """Whether a word is the end of a name, or `re:` and an expression found in it."""
    if word.startswith("re:"):
        return searches(word[3:], name)
    return name == word or name.endswith(f".{word}")


def find_biases(model: nn.Module, which: Bias, targets: Sequence[Target], *, known: Set[str]) -> tuple[str, ...]:
    """The names of the biases to train that are not `known` to be trained already.

    Raises RecipeError where there is none.
    """
    if which == "none":
        return ()
    adapted = {f"{target.name}.bias" for target in targets}
    biases = tuple(
        name
        for name, _ in model.named_parameters()
        if name.endswith(".bias") and name not in known and (which == "all" or name in adapted)
    )
    if not biases:
        layers = "the model's layers" if which == "all" else "the adapted layers"
        raise RecipeError(f"method.bias: {which}: {layers} have no bias. Leave it out.")
    return biases


def weights_of(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of `modules` by their names in the model; one that has two names comes under the first."""
    names: dict[nn.Parameter, str] = {}
    for module in modules:
        for name, parameter in model.get_submodule(module).named_parameters():
            names.setdefault(parameter, f"{module}.{name}")
    return {name: parameter for parameter, name in names.items()}


def tied_modules(model: nn.Module, modules: Sequence[str]) -> dict[str, str]:
    """The modules that hold a weight of `modules` too, each with the name of the one it shares it with."""
    weights = {parameter: name.rpartition(".")[0] for name, parameter in weights_of(model, modules).items()}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        is_among = any(name == one or name.startswith(f"{one}.") for one in modules)
        shared = [weights[weight] for weight in module.parameters(recurse=False) if weight in weights]
        if shared and not is_among:
            found[name] = shared[0]
    return found


def tied_notes(model: nn.Module, modules: Sequence[str]) -> tuple[str, ...]:
    """What to say of modules that are trained too since their weight is that of another."""
    return tuple(
        f"method.also_train: {other} is trained with {one}: they are one weight (tied)"
        for other, one in tied_modules(model, modules).items()
    )


def saved_modules(model: nn.Module, modules: Sequence[str]) -> Mapping[str, nn.Parameter]:
    """The parameters of `modules` under every name that an adapter's file needs: tied ones under each."""
    return {
        f"{module}.{name}": parameter
        for module in (*modules, *tied_modules(model, modules))
        for name, parameter in model.get_submodule(module).named_parameters()
    }
