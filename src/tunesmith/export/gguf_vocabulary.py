"""A tokenizer as llama.cpp wants it: its tokens with their kinds, merges or scores, control tokens, and template."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from tunesmith.errors import ModelError
from tunesmith.export.gguf_word_pieces import add_word_pieces, as_there, check_word_pieces
from tunesmith.export.pre_tokenizers import Rule, find_rule
from tunesmith.export.source import Source
from tunesmith.models.gguf import read_gguf
from tunesmith.tasks import TASKS
from tunesmith.types import Part

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """What of a tokenizer goes into the header."""

    model: str
    """gpt2: byte level; llama: pieces of sentencepiece; bert: pieces of words."""
    rule: Rule
    backend: Mapping[str, Any]
    """The tokenizer's own file."""


def find_vocabulary(source: Source, pre: str | None) -> Vocabulary:
    """Which of llama.cpp's tokenizers this one is. Raises ModelError for one that it does not have."""
    tokenizer = source.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] == "WordPiece":
        check_word_pieces(source.weights.name, backend)
        return Vocabulary("bert", Rule("default", "words are cut into the longest pieces, as BERT's are"), backend)
    if model["type"] != "BPE":
        raise ModelError(
            f"gguf: a tokenizer of the kind {model['type']} cannot be written here. Export merged instead, and convert "
            "that with llama.cpp's convert_hf_to_gguf.py."
        )
    if model.get("byte_fallback"):
        return Vocabulary("llama", Rule("default", "sentencepiece splits nothing beforehand"), backend)
    of_gguf = None
    if source.base.is_gguf:
        of_gguf = read_gguf(source.base.path).metadata.get("tokenizer.ggml.pre")
    return Vocabulary("gpt2", find_rule(tokenizer, given=pre, of_gguf=of_gguf), backend)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, source: Source, *, num_rows: int) -> None:
    """Write the tokenizer; `num_rows` are those of the embedding, which may be more than the tokens."""
    tokenizer, backend = source.tokenizer, vocabulary.backend
    tokens, kinds = _tokens(tokenizer, backend, num_rows)
    if vocabulary.model == "bert":
        normal = int(gguf.TokenType.NORMAL)
        tokens = [as_there(t) if kind == normal else t for t, kind in zip(tokens, kinds, strict=True)]
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule.name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if vocabulary.model == "bert":
        add_word_pieces(writer, backend, tokenizer)
        return
    if vocabulary.model == "gpt2":
        writer.add_token_merges([" ".join(_pair(merge)) for merge in backend["model"]["merges"]])
    else:
        writer.add_token_scores(_scores(tokens, kinds, backend))
        writer.add_add_space_prefix(_has_prefix(backend))
    for name, token_id in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
        ("eot", _end_of_turn(source)),
    ):
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(int(token_id))
    writer.add_add_bos_token(begins_with_bos(source))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def begins_with_bos(source: Source) -> bool:
    """Whether llama.cpp is to put a BOS in front of a text: if the tokenizer does so itself, and prompts of training
    begin with one.

    Where the chat template writes it too, llama.cpp takes one of the two away. Where the template alone writes it, or
    begins with another control token that is also called BOS (SmolLM2), it is left to the template.
    """
    bos = source.tokenizer.bos_token_id
    role = TASKS[source.renderer.task_name].input_role
    prompt = source.renderer.prompt_ids([Part(role, "Hi", False)])
    return bos is not None and prompt[:1] == [bos] and source.tokenizer("a")["input_ids"][:1] == [bos]


def _end_of_turn(source: Source) -> int | None:
    """What closes an answer, where that is not the end of a text."""
    stops = [token_id for token_id in source.renderer.stop_ids if token_id != source.tokenizer.eos_token_id]
    return stops[0] if stops else None


def _tokens(
    tokenizer: PreTrainedTokenizerBase, backend: Mapping[str, Any], num_rows: int
) -> tuple[list[str], list[int]]:
    words = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in backend["added_tokens"]}
    kind = gguf.TokenType
    tokens, kinds = [], []
    for token_id in range(num_rows):
        token = words.get(token_id)
        if token is None:
            tokens.append(f"[PAD{token_id}]")
            kinds.append(kind.UNUSED)
            continue
        tokens.append(token)
        if token_id == tokenizer.unk_token_id and backend["model"].get("byte_fallback"):
            kinds.append(kind.UNKNOWN)
        elif token_id in added:
            kinds.append(kind.CONTROL if added[token_id]["special"] else kind.USER_DEFINED)
        elif backend["model"].get("byte_fallback") and _BYTE.fullmatch(token):
            kinds.append(kind.BYTE)
        else:
            kinds.append(kind.NORMAL)
    return tokens, [int(k) for k in kinds]


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _scores(tokens: list[str], kinds: list[int], backend: Mapping[str, Any]) -> list[float]:
    """Sentencepiece joins the pair whose joint piece has the highest score; the tokenizer's file lists its merges in
    that order, so the place of a piece among them is its score."""
    places: dict[str, int] = {}
    for merge in backend["model"]["merges"]:
        places.setdefault("".join(_pair(merge)), len(places))
    normal = int(gguf.TokenType.NORMAL)
    return [
        -float(places.get(token, len(places))) if kind == normal else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def _has_prefix(backend: Mapping[str, Any]) -> bool:
    """Whether a blank is put in front of a text."""
    text = json.dumps([backend.get("normalizer"), backend.get("pre_tokenizer")])
    return '"Prepend"' in text or ('"Metaspace"' in text and '"prepend_scheme": "never"' not in text)
