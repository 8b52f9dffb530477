"""Which weights full tuning trains: from the words of a recipe to parameters of a model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from torch import nn

from tunesmith.errors import RecipeError
from tunesmith.methods.patterns import searches
from tunesmith.methods.targets import is_in_layers, layer_counts
from tunesmith.methods.whole import means
from tunesmith.models.heads import new_param_names
from tunesmith.recipe.methods import LAYER_WORD


def choose(model: nn.Module, *, train: Sequence[str], freeze: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters to train, by name, in the order of the model: those that `train` means, all if it is empty, but
    for those that `freeze` means.

    A word is last:4, first:4, 7 or 0-3, layers counted from 0 in each stack of them; the end of a module's or weight's
    name (embed_tokens, norm.weight); or re: and a regular expression searched for in whole names of weights. A weight
    that has two names (tied) is meant by either.

    Raises:
        RecipeError: a word that means no weight, nothing left to train, or a weight frozen that is new and random.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    meant = {option: _meant(model, words, names, option) for option, words in (("train", train), ("freeze", freeze))}
    chosen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if (not train or id(parameter) in meant["train"]) and id(parameter) not in meant["freeze"]
    }
    if not chosen:
        raise RecipeError("method.freeze: every weight that would be trained is frozen. Name less of it.")
    if random := [name for name in new_param_names(model) if name not in chosen]:
        raise RecipeError(
            f"method.{'freeze' if not train else 'train'}: {random[0]} is new, and would stay the random numbers that "
            f"it is. {'Name it too' if train else 'Leave it out'}."
        )
    return chosen


def notes(model: nn.Module, chosen: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """What to say of what is frozen, and of weights that are trained under another name too."""
    frozen = [(name, weight) for name, weight in model.named_parameters() if name not in chosen]
    if not frozen:
        return ()
    num, total = (sum(p.numel() for p in some) for some in ((p for _, p in frozen), model.parameters()))
    return (f"frozen: {len(frozen)} weights, {num / total:.1%} of the model, such as {frozen[0][0]}",)


def _meant(model: nn.Module, words: Sequence[str], names: Mapping[int, Sequence[str]], option: str) -> set[int]:
    """Ids of the parameters that `words` mean."""
    counts = layer_counts(model)
    problems: list[str] = []
    found: set[int] = set()
    for word in words:
        some = {key for key, known in names.items() if any(_means(word, name, counts) for name in known)}
        if not some:
            problems.append(f"method.{option}: {word!r} means no weight.{_near(word, names, counts)}")
        found |= some
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def _means(word: str, name: str, counts: Mapping[str, int]) -> bool:
    if LAYER_WORD.fullmatch(word):
        return is_in_layers(word, name, counts)
    if word.startswith("re:"):
        return searches(word[3:], name)
    parts = name.split(".")
    return any(means(word, ".".join(parts[:end])) for end in range(1, len(parts) + 1))


def _near(word: str, names: Mapping[int, Sequence[str]], counts: Mapping[str, int]) -> str:
    """What could have been meant."""
    if LAYER_WORD.fullmatch(word):
        stacks = ", ".join(f"{stack} has {count}" for stack, count in counts.items()) or "there are no layers"
        return f" Counted from 0, {stacks}."
    parts = {part for known in names.values() for name in known for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(word.rpartition(".")[2], sorted(parts), n=1)
    return f"{f' Did you mean {near[0]}?' if near else ''} There are: {', '.join(sorted(parts))}."
