"""Models small enough to be made inside a test, one for each architecture the project is known to meet."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from tunesmith.models.heads import label_settings
from tunesmith.types import HeadName, Labels

SLIDING = {"sliding_window": 8}
DROPOUTS = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout", "resid_dropout",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "seq_classif_dropout", "dropout_rate", "activation_dropout",
    "classifier_dropout", "summary_last_dropout", "pooler_dropout",
)  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"gpt2": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2, **SLIDING},
    "mistral": {"head_dim": 16, **SLIDING},
    "phi3": {"pad_token_id": 0, "eos_token_id": 1},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neox": {},
    "olmo2": {},
    "smollm3": {"pad_token_id": 0},
    "granite": {},
    "cohere": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
}
"""Causal models, and what each needs beside the common sizes."""

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "electra": {"embedding_size": 32},
    "deberta-v2": {"pad_token_id": 0, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": {
        "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
        "local_attention": 16, "layer_types": ["full_attention", "sliding_attention"],
    },
    "mpnet": {},
}  # fmt: skip

TRANSLATORS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "max_position_embeddings": None,
    },
    "bart": {
        "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    },
}  # fmt: skip
"""Encoder–decoders."""

HEADS: dict[HeadName, Any] = {
    "next_token": AutoModelForCausalLM,
    "masked_token": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}


def tiny_model(
    arch: str = "llama",
    *,
    vocab_size: int,
    head: HeadName = "next_token",
    labels: Labels | None = None,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    **settings: Any,
) -> PreTrainedModel:
    """A randomly initialised model with 4 heads, 2 of keys and values where the architecture groups them."""
    if arch == "gpt2":
        sizes: dict[str, Any] = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 512}
    else:
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
        }
    special = {
        name: value for name, value in {**SETTINGS, **ENCODERS, **TRANSLATORS}.get(arch, {}).items() if name != "gpt2"
    }
    names = {} if labels is None else label_settings(labels)
    config = AutoConfig.for_model(arch, vocab_size=vocab_size, **{**sizes, **special, **names, **settings})
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(seed)
    return (AutoModelForSeq2SeqLM if arch in TRANSLATORS else HEADS[head]).from_config(config, dtype=dtype)


def seeing_model(vocab_size: int) -> PreTrainedModel:
    """Gemma 3 as from 4 billion weights on: a language model behind one that sees, with names of layers in common."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    text = {**sizes, "hidden_size": 64, "num_key_value_heads": 2, "vocab_size": vocab_size, **SETTINGS["gemma3_text"]}
    sight = {**sizes, "num_hidden_layers": 3, "hidden_size": 32, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=sight, mm_tokens_per_image=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)
