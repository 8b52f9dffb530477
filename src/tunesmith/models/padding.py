"""The token that fills up shorter rows, where an answer depends on it.

A causal model with a head answers at a text's last token. transformers finds it as the last one that is not the pad
token: where that is the end token too, it takes the token before. Here the last token is known by the row's length; the
pad token is set apart for whoever reads the saved model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.models.heads import pools_last

NEW = "<|padding|>"


def choose(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, on_note: Callable[[str], None]) -> None:
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
            "no token of the model is free for padding: it shares its end token. Here rows are told apart by their "
            "length; other programs must give the saved model one text at a time"
        )
    else:
        text = NEW if chosen == len(tokenizer) else tokenizer.convert_ids_to_tokens(chosen)
        on_note(f"padding is {text} ({chosen}) from now on: the model's own was its end token, or there was none")


def fitted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer to save beside the model: one that pads with the token that the model passes over."""
    if not pools_last(model):
        return tokenizer
    pad = model.config.get_text_config().pad_token_id
    if pad is None or pad == tokenizer.pad_token_id:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = NEW if pad == len(tokenizer) else tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that shorter rows are padded with: the tokenizer's own, as in pre-training; 0 where it has none.

    Most models never see it. In some whose tokens read their neighbours (MobileBERT, ConvBERT, FNet) real tokens do.
    """
    own, num_rows = tokenizer.pad_token_id, model.get_input_embeddings().weight.shape[0]
    return int(own) if own is not None and own < num_rows else 0


def _ends(token_ids: int | list[int] | None) -> set[int]:
    return set() if token_ids is None else {token_ids} if isinstance(token_ids, int) else set(token_ids)


def _free_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> int | None:
    """The tokenizer's own pad token, another control token that ends no text, or a row that no token uses yet."""
    own = tokenizer.pad_token_id
    if own is not None and own not in ends:
        return int(own)
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
