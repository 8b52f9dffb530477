"""Tokens that a recipe adds to a model's vocabulary, and the pad token.

A causal model with a head answers at a text's last token. transformers finds it as the last one that is not the
pad token: where that is the end token too, it takes the token before. Here the last token is known by the row's
length; the pad token is set apart for other programs that read the saved model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.errors import ModelError, RecipeError
from tunesmith.models.heads import pools_last
from tunesmith.phrases import listed
from tunesmith.types import Aside


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens that were added to a vocabulary."""

    ids: tuple[int, ...] = ()
    pieces: tuple[tuple[int, ...], ...] = ()
    """For each, the tokens that its text was before."""


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> NewTokens:
    """Add tokens that are matched in any text, in the order given. Raises RecipeError for one that is there
    already or that the tokenizer makes nothing of."""
    if not texts:
        return NewTokens()
    known, problems = tokenizer.get_vocab(), []
    pieces = [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    for text, ids in zip(texts, pieces, strict=True):
        if text in known:
            problems.append(f"data.new_tokens: {text!r} is a token of this model already. Leave it out.")
        elif not text.strip() or not ids:
            problems.append(f"data.new_tokens: {text!r} is not a text. Leave it out.")
        elif texts.count(text) > 1:
            problems.append(f"data.new_tokens: {text!r} is there twice. Give it once.")
    if problems:
        raise RecipeError("\n".join(dict.fromkeys(problems)))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
    return NewTokens(tuple(int(i) for i in tokenizer.convert_tokens_to_ids(list(texts))), tuple(pieces))


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, new: NewTokens) -> None:
    """Give each new token a row of the embedding and of the head: the mean of the rows of its pieces.

    A vocabulary that was padded has rows already, and never loses any. `new_token_ids` has the model's.
    """
    if not new.ids:
        return
    num_rows = _weight(model.get_input_embeddings()).shape[0]
    if min(new.ids) > num_rows:
        raise ModelError(
            f"data.new_tokens: the tokenizer has {min(new.ids):,} tokens before them, the embedding of the "
            f"model {num_rows:,} rows: those between have no vector. Take the tokenizer that belongs to the "
            "model."
        )
    if max(new.ids) >= num_rows:
        model.resize_token_embeddings(max(new.ids) + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is None:
            continue
        rows = _weight(module)
        for token_id, pieces in zip(new.ids, new.pieces, strict=True):
            rows[token_id] = rows[list(pieces)].float().mean(0)
    model.new_token_ids = new.ids


def new_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Ids of the tokens that were added to a model when it was loaded."""
    return getattr(model, "new_token_ids", ())


def describe(new: NewTokens, texts: Sequence[str]) -> list[str]:
    """Notes for a person on the tokens that were added."""
    if not new.ids:
        return []
    shown = listed(map(repr, texts))
    return [f"{len(texts)} new tokens ({shown}): each begins as the mean of the tokens that its text was before"]


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight


NEW = "<|padding|>"


def choose_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_note: Callable[[str], None]
) -> None:
    """Give a model that answers at the last token a pad token that ends no text, unless it has one."""
    config = model.config.get_text_config()
    ends = _ends(config.eos_token_id) | _ends(tokenizer.eos_token_id)
    pad = config.pad_token_id
    if pad is not None and pad >= 0 and pad not in ends:
        return
    chosen = _free_token(model, tokenizer, ends)
    config.pad_token_id = chosen
    if chosen is None:
        on_note(
            "no token of the model is free for padding: it shares its end token. Here the end of a row is "
            "known by its length; other programs must give the saved model one text at a time"
        )
    else:
        text = NEW if chosen == len(tokenizer) else tokenizer.convert_ids_to_tokens(chosen)
        why = "the model's own was its end token, or there was none"
        on_note(Aside(f"padding is {text} ({chosen}) from now on: {why}"))


def with_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer to save with the model: one that pads with the model's pad token."""
    if not pools_last(model):
        return tokenizer
    pad = model.config.get_text_config().pad_token_id
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = NEW if pad == len(tokenizer) else tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that shorter rows are padded with: the tokenizer's own, as in pre-training; 0 if it has none.

    Most models never see it. In some whose tokens read neighbours (MobileBERT, ConvBERT, FNet) real ones do.
    """
    token_id, num_rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
    return int(token_id) if token_id is not None and token_id < num_rows else 0


def without_vector(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """Why the model cannot read a text: its first token beyond the embedding. "" if all have vectors."""
    num = model.get_input_embeddings().weight.shape[0]
    odd = next((int(i) for i in token_ids if i >= num), None)
    if odd is None:
        return ""
    return (
        f"the token {tokenizer.convert_ids_to_tokens(odd)!r} ({odd}) has no vector, for the embedding of the "
        f"model has {num:,} rows: its tokenizer was made longer, the model not. Take the tokenizer that "
        "belongs to it, or save it after resize_token_embeddings of transformers."
    )


def _ends(token_ids: int | list[int] | None) -> set[int]:
    return set() if token_ids is None else {token_ids} if isinstance(token_ids, int) else set(token_ids)


def _free_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int | None:
    """The tokenizer's own pad token, another control token that ends no text, or a row that no token uses."""
    pad_token = tokenizer.pad_token_id
    if pad_token is not None and pad_token not in ends:
        return int(pad_token)
    taken = ends | _ends(tokenizer.bos_token_id)
    control = [
        ("pad" not in str(token).lower(), token_id != tokenizer.unk_token_id, token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token_id not in taken
    ]
    if control:
        return int(min(control)[-1])
    num_rows = model.get_input_embeddings().weight.shape[0]
    return len(tokenizer) if len(tokenizer) < num_rows else None
