"""The architectures that can be written as GGUF: header keys, limits of llama.cpp, and layout of weights.

Source: the converters of llama.cpp (conversion/*.py) and its graphs, which define what is read.
"""

# H heads, D dimensions of a head, O outputs, R rank

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.phrases import percent
from tunesmith.types import JsonObject

Facts = JsonObject
"""Header keys without the architecture's name; values are bools, ints and floats."""

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of llama.cpp."""

    name: str
    facts: Callable[[PreTrainedConfig], Facts]
    limits: Callable[[PreTrainedConfig], list[str]]
    """Parts of a config that llama.cpp does not compute, in words; such a model is not written."""
    interleaves: bool = False
    """Whether llama.cpp rotates neighboring rows of queries and keys instead of halves."""
    norm_offset: float = 0.0
    """Added to the weights of norms."""
    transposed: tuple[str, ...] = ("\0",)
    """Name endings of weights that are stored [inputs, outputs]."""
    rope_factors: bool = False
    """Whether scaled rotary frequencies are written as factors."""

    def to_gguf(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """A weight in llama.cpp's layout; `name` is transformers' name."""
        if name.endswith(self.transposed):
            return tensor.t().contiguous()
        if name.endswith("norm.weight"):
            return tensor + self.norm_offset
        num_heads = self.num_interleaved(name, config)
        return interleave(tensor, num_heads) if num_heads else tensor

    def num_interleaved(self, name: str, config: PreTrainedConfig) -> int:
        """Heads of a weight whose rows are reordered; 0 for other weights."""
        if not self.interleaves or not (".q_proj." in name or ".k_proj." in name):
            return 0
        return int(config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)


def interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """[H·D, …] with the two halves of each head's rows interleaved."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def rope_factors(model: nn.Module, config: PreTrainedConfig) -> Tensor | None:
    """The divisor of each rotary frequency; None if the frequencies are not scaled."""
    if _rope(config).get("rope_type", "default") == "default":
        return None
    rotary: Any = model.get_submodule(f"{model.base_model_prefix}.rotary_emb")
    scaled: Tensor = rotary.inv_freq.float().cpu()
    size = _head_dim(config)
    plain = 1.0 / _theta(config) ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / scaled


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: PreTrainedConfig) -> JsonObject:
    rope = config.rope_parameters
    return rope.get("full_attention", rope)  # type: ignore[no-any-return]


def _theta(config: PreTrainedConfig) -> float:
    return float(_rope(config)["rope_theta"])


def _sizes(config: PreTrainedConfig) -> Facts:
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }


def _decoder(config: PreTrainedConfig) -> Facts:
    return {
        **_sizes(config),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "rope.freq_base": _theta(config),
        "vocab_size": config.vocab_size,
    }


def _llama(config: PreTrainedConfig) -> Facts:
    return {**_decoder(config), "rope.dimension_count": _head_dim(config)}


def _gemma2(config: PreTrainedConfig) -> Facts:
    facts = {**_decoder(config), "attention.sliding_window": config.sliding_window}
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping}  # fmt: skip
    return {**facts, **{key: float(cap) for key, cap in caps.items() if cap is not None}}


def _phi3(config: PreTrainedConfig) -> Facts:
    window = {"attention.sliding_window": config.sliding_window} if config.sliding_window else {}
    return {**_decoder(config), "rope.dimension_count": _head_dim(config), **window,
            "rope.scaling.original_context_length": config.max_position_embeddings}  # fmt: skip


def _gpt2(config: PreTrainedConfig) -> Facts:
    return {
        **_sizes(config),
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _plain_rope(config: PreTrainedConfig, *, factors: bool = False) -> list[str]:
    known = ("default", "llama3", "linear") if factors else ("default",)
    kind = _rope(config).get("rope_type", "default")
    partial = _rope(config).get("partial_rotary_factor", 1.0) or 1.0
    problems = [] if kind in known else [f"its rotary embedding is scaled by the rule {kind!r}"]
    return problems + ([f"only {percent(partial, 0)} of each head is rotated"] if partial != 1.0 else [])


def _window(config: PreTrainedConfig) -> list[str]:
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    return [f"it attends to the last {window} tokens only (sliding_window)"] if window and uses else []


def _llama_limits(config: PreTrainedConfig) -> list[str]:
    return _plain_rope(config, factors=True) + _window(config)


def _qwen_limits(config: PreTrainedConfig) -> list[str]:
    return _plain_rope(config) + _window(config)


def _activation(name: str, other: str) -> list[str]:
    return [] if name in ("gelu_pytorch_tanh", other) else [f"its activation is {name}"]


def _gemma_scale(config: PreTrainedConfig) -> list[str]:
    if config.query_pre_attn_scalar == _head_dim(config):
        return []
    scale = config.query_pre_attn_scalar
    return [f"its scores are scaled by {scale}, not by the {_head_dim(config)} of a head"]


def _gemma3_limits(config: PreTrainedConfig) -> list[str]:
    problems = _plain_rope(config) + _gemma_scale(config)
    layers = range(1, config.num_hidden_layers + 1)
    due = ["full_attention" if layer % 6 == 0 else "sliding_attention" for layer in layers]
    if list(config.layer_types) != due:
        problems.append("its layers do not alternate in sixes: five with a sliding window, one without")
    near = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10_000)
    if near != 10_000:
        problems.append(f"its sliding layers have the rotary base {near:g}, not 10000")
    return problems


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, _llama_limits, interleaves=True, rope_factors=True),
    "mistral": Architecture("llama", _llama, _llama_limits, interleaves=True, rope_factors=True),
    "qwen2": Architecture("qwen2", _decoder, _qwen_limits),
    "qwen3": Architecture("qwen3", _decoder, _qwen_limits),
    "gemma2": Architecture(
        "gemma2", _gemma2, lambda config: _plain_rope(config) + _gemma_scale(config), norm_offset=1.0
    ),
    "gemma3_text": Architecture("gemma3", _gemma2, _gemma3_limits, norm_offset=1.0),
    "phi3": Architecture("phi3", _phi3, _plain_rope),
    "gpt2": Architecture(
        "gpt2",
        _gpt2,
        lambda config: _activation(config.activation_function, "gelu_new"),
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}
"""By transformers' model_type. tests/export/test_gguf.py compares each with its model."""


def find_architecture(config: PreTrainedConfig, name: str) -> Architecture:
    """The architecture of a model. Raises ModelError if llama.cpp has none, or would compute another model."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"{name}: gguf: a {config.model_type} cannot be written. Those that can: "
            f"{', '.join(ARCHITECTURES)}. Export merged, and convert that with llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    if limits := architecture.limits(config):
        raise ModelError(
            f"{name}: gguf: llama.cpp would compute another model: {'; '.join(limits)}. Export merged instead."
        )
    return architecture


def tensor_names(architecture: Architecture, names: list[str], num_layers: int) -> dict[str, str]:
    """llama.cpp's name of each weight. Raises ModelError for a weight without one."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(number, num_layers)
    names_there = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if lost := [name for name, other in names_there.items() if other is None]:
        raise ModelError(
            f"gguf: llama.cpp has no name for {len(lost)} weights of a {architecture.name}, such as {lost[0]}"
        )
    return names_there


def model_names(architecture: Architecture, model: PreTrainedModel) -> dict[str, str]:
    """llama.cpp's name of each weight that is written: all but a tied output layer."""
    names = list(model.state_dict())
    if model.config.tie_word_embeddings:
        names.remove("lm_head.weight")
    return tensor_names(architecture, names, model.config.num_hidden_layers)
