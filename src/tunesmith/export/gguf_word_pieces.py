"""BERT's tokenizer in a GGUF: small letters, words, and the longest pieces of each.

Source: llama.cpp, llm_tokenizer_wpm of src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tunesmith.errors import ModelError
from tunesmith.models.gguf import read_gguf

_BEGUN, _CONTINUED = "▁", "##"
_LOWERCASE, _ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
_SPECIAL = {"cls": "cls", "sep": "seperator", "mask": "mask", "unk": "unknown", "pad": "padding"}
"""llama.cpp's names of special tokens, its spelling."""


def check_word_pieces(name: str, backend: Mapping[str, Any]) -> None:
    """Raise ModelError for a tokenizer whose steps are not BERT's: llama.cpp takes no others."""
    steps = [str((backend.get(step) or {}).get("type")) for step in ("normalizer", "pre_tokenizer")]
    begin = str(backend["model"]["continuing_subword_prefix"])
    splits_chinese = (backend.get("normalizer") or {}).get("handle_chinese_chars")
    if steps != ["BertNormalizer", "BertPreTokenizer"] or begin != _CONTINUED or not splits_chinese:
        raise ModelError(
            f"{name}: gguf: its tokenizer cuts words into pieces in another way than BERT's, which is all that "
            f"llama.cpp knows ({', '.join(steps)}, {begin!r}). Export merged or onnx."
        )


def add_word_pieces(writer: gguf.GGUFWriter, backend: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Write how letters are made small, and the marks around a text."""
    lowercase, accents = bool(backend["normalizer"]["lowercase"]), backend["normalizer"]["strip_accents"]
    writer.add_bool(_LOWERCASE, lowercase)
    writer.add_bool(_ACCENTS, lowercase if accents is None else bool(accents))  # BERT's own rule
    for name, theirs in _SPECIAL.items():
        if (token_id := getattr(tokenizer, f"{name}_token_id")) is not None:
            writer.add_uint32(f"tokenizer.ggml.{theirs}_token_id", token_id)
    writer.add_bos_token_id(tokenizer.cls_token_id)
    writer.add_eos_token_id(tokenizer.sep_token_id)
    writer.add_add_bos_token(True)
    writer.add_add_sep_token(True)


def as_there(token: str) -> str:
    """llama.cpp marks the pieces that begin a word, BERT those that go on with one."""
    return token.removeprefix(_CONTINUED) if token.startswith(_CONTINUED) else f"{_BEGUN}{token}"


def _as_here(token: str) -> str:
    return token.removeprefix(_BEGUN) if token.startswith(_BEGUN) else f"{_CONTINUED}{token}"


def read_word_pieces(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a file, which splits text as llama.cpp does; it knows no types of tokens."""
    fields, facts = gguf.GGUFReader(path).fields, read_gguf(path).metadata
    kinds = facts["tokenizer.ggml.token_type"]
    normal = int(gguf.TokenType.NORMAL)
    tokens = [
        _as_here(token) if kind == normal else token
        for token, kind in zip(fields["tokenizer.ggml.tokens"].contents(), kinds, strict=True)
    ]
    special = {name: tokens[facts[f"tokenizer.ggml.{theirs}_token_id"]] for name, theirs in _SPECIAL.items()
               if f"tokenizer.ggml.{theirs}_token_id" in facts}  # fmt: skip
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=facts[_LOWERCASE], strip_accents=facts[_ACCENTS])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [(special[name], vocabulary[special[name]]) for name in ("cls", "sep")]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}", special_tokens=marks
    )
    user_defined = int(gguf.TokenType.USER_DEFINED)
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == user_defined]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=facts["bert.context_length"],
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": token for name, token in special.items()},
    )
