"""Tiny mixtures of experts, one for each family, and adapters on them as training could have left them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_model import tiny_model
from tunesmith.methods.lora import LoraAttachment, attach
from tunesmith.recipe.methods import LoraMethod

VOCAB = 61
IDS = torch.randint(0, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))

_FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
_LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_FOUR, "moe_intermediate_size": 32, "head_dim": 16},
    "gpt_oss": {**_LOCAL, "head_dim": 16, "sliding_window": 8},
    "mixtral": {**_LOCAL},
    "qwen2_moe": {**_FOUR, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "olmoe": {**_FOUR, "pad_token_id": 0, "eos_token_id": 1},
    "deepseek_v2": {**_ROUTED, **_LATENT},
    "deepseek_v3": {**_ROUTED, **_LATENT, "n_group": 2, "topk_group": 1},
    "granitemoe": {**_LOCAL},
    "phimoe": {**_LOCAL, "router_jitter_noise": 0.0},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1},
    "glm4_moe": {**_ROUTED, "head_dim": 16, "pad_token_id": 0},
    "dots1": {**_ROUTED, "sliding_window": 8},
    "minimax_m2": {**_LOCAL, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2},
    "qwen3_next": {
        **_FOUR, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "head_dim": 16,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2_moe": {
        **_FOUR, "moe_intermediate_size": 32, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"],
    },
    "flex_olmo": {**_FOUR, "pad_token_id": 0, "eos_token_id": 1},
    "jamba": {**_FOUR, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 0},
}  # fmt: skip
"""What each family needs besides the common sizes."""
UNKNOWN: dict[str, dict[str, Any]] = {
    "jetmoe": {**_LOCAL, "kv_channels": 16},
    "llama4_text": {**_LOCAL, "head_dim": 16, "intermediate_size_mlp": 128, "attention_chunk_size": 8},
}
"""Families whose experts compute in their own way."""


def mixture(family: str, *, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    settings = {**FAMILIES, **UNKNOWN}[family]
    return tiny_model(family, vocab_size=VOCAB, dtype=dtype, **{**settings, **more}).eval()


def drawn(shape: torch.Size, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(model: PreTrainedModel, **settings: Any) -> LoraAttachment:
    """Adapters on attention and experts, none of their numbers zero: PEFT takes other layers for experts."""
    attachment = attach(model, LoraMethod(**{"targets": ("attention", "experts"), "alpha": 12, **settings}), seed=0)
    with torch.no_grad():
        for number, tensor in enumerate(attachment.trained.values()):
            tensor.copy_(0.1 * drawn(tensor.shape, number))
    attachment.publish()
    return attachment


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten())
