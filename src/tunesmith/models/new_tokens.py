"""Tokens that a recipe adds to a model's vocabulary: in the tokenizer, and as rows of its embedding and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import RecipeError
from tunesmith.models.load import load_tokenizer
from tunesmith.models.locate import Located
from tunesmith.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What was added."""

    ids: tuple[int, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()
    """Of each, the tokens that its text was before."""


def add(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> NewTokens:
    """Add tokens that are matched in any text, in the order given. Raises RecipeError for one that is there already or
    that the tokenizer makes nothing of."""
    if not texts:
        return NewTokens()
    known, problems = tokenizer.get_vocab(), []
    pieces = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    for text, some in zip(texts, pieces, strict=True):
        if text in known:
            problems.append(f"data.new_tokens: {text!r} is a token of this model already. Leave it out.")
        elif not text.strip() or not some:
            problems.append(f"data.new_tokens: {text!r} is no text. Leave it out.")
        elif texts.count(text) > 1:
            problems.append(f"data.new_tokens: {text!r} stands twice. Give it once.")
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    return NewTokens(tuple(int(i) for i in tokenizer.convert_tokens_to_ids(list(texts))), tuple(pieces))


def of_recipe(recipe: Recipe, located: Located) -> NewTokens:
    """What a run's recipe adds to its base."""
    return add(load_tokenizer(located, None), recipe.data.new_tokens) if recipe.data.new_tokens else NewTokens()


@torch.no_grad()
def make_room(model: PreTrainedModel, new: NewTokens) -> None:
    """Give each new token a row of the embedding and of the head: the mean of the rows of its pieces.

    A vocabulary that was padded has rows already, and never loses any. `ids_of` tells the tokens of the model.
    """
    if not new.ids:
        return
    weight = _weight(model.get_input_embeddings())
    if max(new.ids) >= weight.shape[0]:
        model.resize_token_embeddings(max(new.ids) + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None:
            continue
        rows = _weight(module)
        for token_id, pieces in zip(new.ids, new.pieces, strict=True):
            rows[token_id] = rows[list(pieces)].float().mean(0)
    model.new_token_ids = new.ids


def ids_of(model: nn.Module) -> tuple[int, ...]:
    """The tokens that were added to a model when it was loaded."""
    return getattr(model, "new_token_ids", ())


def say(new: NewTokens, texts: Sequence[str]) -> list[str]:
    """What a person should know of them."""
    if not new.ids:
        return []
    listed = ", ".join(map(repr, texts[:6])) + (f" and {len(texts) - 6} more" if len(texts) > 6 else "")
    return [f"{len(texts)} new tokens ({listed}): each begins as the mean of the tokens that its text was before"]


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight
