"""Models small enough to be made inside a test, one for each architecture the project is known to meet."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SLIDING = {"sliding_window": 8}
DROPOUTS = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "dropout", "resid_dropout",
)  # fmt: skip

SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"gpt2": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
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
"""What each needs beside the common sizes."""


def tiny_model(
    arch: str = "llama",
    *,
    vocab_size: int,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    **settings: Any,
) -> PreTrainedModel:
    """A randomly initialised causal model with 4 heads, 2 of keys and values where the architecture groups them."""
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
    special = {name: value for name, value in SETTINGS[arch].items() if name != "gpt2"}
    config = AutoConfig.for_model(arch, vocab_size=vocab_size, **{**sizes, **special, **settings})
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)
