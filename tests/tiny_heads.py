"""Models small enough for a test that read whole texts: encoders and causal ones with heads, and an encoder–decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tiny import tiny_tokenizer
from tunesmith.data.labels import Labels
from tunesmith.models.heads import label_settings

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """Texts between <s> and </s>, the second of a pair by token type 1."""
    tokenizer = tiny_tokenizer(None, eos="</s>")
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ids
    )
    tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token = "<s>", "</s>", "<unk>"
    return tokenizer


def encoder_config(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> BertConfig:
    settings = {"max_position_embeddings": 64, "pad_token_id": tokenizer.pad_token_id, **settings}
    return BertConfig(vocab_size=len(tokenizer), **SIZES, **settings)


def headed(path: Path, labels: Labels, *, arch: str = "bert", seed: int = 0) -> Path:
    """A folder with a model that answers with `labels`: with weights large enough that answers differ."""
    tokenizer = encoder_tokenizer() if arch == "bert" else tiny_tokenizer(None)
    if arch == "bert":
        config: Any = encoder_config(tokenizer, **label_settings(labels))
    else:
        sizes = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
        config = LlamaConfig(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **label_settings(labels)
        )
    auto = AutoModelForTokenClassification if labels.kind == "tags" else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    return _saved(path, auto.from_config(config), tokenizer)


def masked(path: Path) -> Path:
    """A folder with an encoder that fills in masked tokens."""
    tokenizer = encoder_tokenizer()
    torch.manual_seed(0)
    return _saved(path, BertForMaskedLM(encoder_config(tokenizer)), tokenizer)


def translator(path: Path) -> Path:
    """A folder with a T5 of two layers."""
    tokenizer = tiny_tokenizer(None, eos="</s>")
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", end)]
    )
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=end, decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return _saved(path, T5ForConditionalGeneration(config), tokenizer)


def _saved(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    for weight in model.parameters():
        weight.data.mul_(5.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
