"""How models go into a GGUF: the facts of each architecture, and what llama.cpp wants of its weights.

Source: the converters of llama.cpp (conversion/*.py) and its graphs, which say what is read and what is fixed in code.
"""

# H heads, D dimensions of a head, O outputs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError

Facts = dict[str, Any]
"""Keys of the header behind the architecture's name, with ints and floats as values."""

REPACKED = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture of llama.cpp."""

    name: str
    facts: Callable[[PreTrainedConfig], Facts]
    limits: Callable[[PreTrainedConfig], list[str]] = lambda config: []
    """What of a config llama.cpp does not compute, in words; nothing is then written."""
    pairs_interleaved: bool = False
    """Rotary pairs of queries and keys stand next to each other instead of in halves."""
    norm_offset: float = 0.0
    """Added to the weights of norms."""
    transposed: tuple[str, ...] = ()
    """Ends of the names of weights that lie [inputs, outputs]."""
    rope_factors: bool = False
    """A scaled rotary embedding is written as a factor a frequency."""

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1] if name.endswith(self.transposed or "\0") else shape

    def fitted(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """A weight as llama.cpp wants it; `name` is that of transformers."""
        if name.endswith(self.transposed or "\0"):
            return tensor.t().contiguous()
        if self.norm_offset and name.endswith("norm.weight"):
            return tensor + self.norm_offset
        num_heads = self._heads_in_turns(name, config)
        return interleaved(tensor, num_heads) if num_heads else tensor

    def fitted_b(self, name: str, b_OR: Tensor, config: PreTrainedConfig) -> Tensor:
        """The B of a low-rank path beside the weight `name`: its rows stand as those of the weight do there."""
        num_heads = self._heads_in_turns(name, config)
        return interleaved(b_OR, num_heads) if num_heads else b_OR

    def unfitted(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """The other way: a weight from there, or what is added to a matrix there, as transformers has it."""
        if name.endswith(self.transposed or "\0"):
            return tensor.t()
        if self.norm_offset and name.endswith("norm.weight"):
            return tensor - self.norm_offset
        num_heads = self._heads_in_turns(name, config)
        return in_halves(tensor, num_heads) if num_heads else tensor

    def _heads_in_turns(self, name: str, config: PreTrainedConfig) -> int:
        """Heads of a weight whose rows are reordered, 0 for the others."""
        if not self.pairs_interleaved or not (".q_proj." in name or ".k_proj." in name):
            return 0
        return int(config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)


def interleaved(tensor: Tensor, num_heads: int) -> Tensor:
    """[H·D, …] with the two halves of each head's rows put in turns: first of the first, first of the second, …"""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape).contiguous()


def in_halves(tensor: Tensor, num_heads: int) -> Tensor:
    """The other way: every second row of a head is of its first half."""
    heads = tensor.reshape(num_heads, tensor.shape[0] // num_heads, -1)
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(tensor.shape)


def rope_factors(model: nn.Module, config: PreTrainedConfig) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by; None where they are the plain ones."""
    if _rope(config).get("rope_type", "default") == "default":
        return None
    rotary: Any = model.get_submodule(f"{model.base_model_prefix}.rotary_emb")
    scaled: Tensor = rotary.inv_freq.float().cpu()
    plain = 1.0 / _theta(config) ** (torch.arange(0, _head_dim(config), 2, dtype=torch.float32) / _head_dim(config))
    return plain / scaled


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return rope.get("full_attention", rope)  # type: ignore[no-any-return]


def _theta(config: Any) -> float:
    return float(_rope(config)["rope_theta"])


def sizes(config: Any) -> Facts:
    """What every architecture has; transformers knows a config's numbers by these names, whatever it calls them."""
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }


def _decoder(config: Any) -> Facts:
    return {
        **sizes(config),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": _head_dim(config),
        "attention.value_length": _head_dim(config),
        "rope.freq_base": _theta(config),
        "vocab_size": config.vocab_size,
    }


def _llama(config: Any) -> Facts:
    return {**_decoder(config), "rope.dimension_count": _head_dim(config)}


def _gemma2(config: Any) -> Facts:
    facts = {**_decoder(config), "attention.sliding_window": config.sliding_window}
    caps = {"attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping}  # fmt: skip
    return {**facts, **{key: float(cap) for key, cap in caps.items() if cap is not None}}


def _phi3(config: Any) -> Facts:
    window = {"attention.sliding_window": config.sliding_window} if config.sliding_window else {}
    return {**_decoder(config), "rope.dimension_count": _head_dim(config), **window,
            "rope.scaling.original_context_length": config.max_position_embeddings}  # fmt: skip


def _gpt2(config: Any) -> Facts:
    return {
        **sizes(config),
        "feed_forward_length": config.n_inner or 4 * config.n_embd,
        "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
    }


def _plain_rope(config: Any, *, factors: bool = False) -> list[str]:
    known = ("default", "llama3", "linear") if factors else ("default",)
    kind = _rope(config).get("rope_type", "default")
    partial = _rope(config).get("partial_rotary_factor", 1.0) or 1.0
    problems = [] if kind in known else [f"its rotary embedding is scaled by the rule {kind!r}"]
    return problems + ([f"only {partial:.0%} of each head is rotated"] if partial != 1.0 else [])


def _window(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None)
    uses = getattr(config, "use_sliding_window", True)
    return [f"it attends to the last {window} tokens only (sliding_window)"] if window and uses else []


def _of_llama(config: Any) -> list[str]:
    return _plain_rope(config, factors=True) + _window(config)


def _of_qwen(config: Any) -> list[str]:
    return _plain_rope(config) + _window(config)


def _of_gemma(config: Any) -> list[str]:
    problems = _plain_rope(config)
    if config.hidden_act not in ("gelu_pytorch_tanh", "gelu"):  # older files say gelu, and mean the other
        problems.append(f"its activation is {config.hidden_act}")
    return problems


def _of_smollm3(config: Any) -> list[str]:
    problems = _plain_rope(config)
    if list(config.no_rope_layers) != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]:
        problems.append("not just every fourth layer of it is without a rotary embedding")
    if config.use_sliding_window:
        problems.append(f"some of its layers attend to the last {config.sliding_window} tokens only")
    return problems


def _of_gemma2(config: Any) -> list[str]:
    return _plain_rope(config) + _gemma_scale(config)


def _gemma_scale(config: Any) -> list[str]:
    if config.query_pre_attn_scalar == _head_dim(config):
        return []
    return [f"its scores are scaled by {config.query_pre_attn_scalar}, not by the {_head_dim(config)} of a head"]


def _of_gemma3(config: Any) -> list[str]:
    problems = _plain_rope(config) + _gemma_scale(config)
    due = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(config.num_hidden_layers)]
    if list(config.layer_types) != due:
        problems.append("its layers do not take turns in sixes: five that look near, one that looks far")
    near = config.rope_parameters.get("sliding_attention", {}).get("rope_theta", 10_000)
    return problems + ([f"its near layers rotate by the base {near:g}, not by 10000"] if near != 10_000 else [])


def _of_gpt2(config: Any) -> list[str]:
    odd = config.activation_function not in ("gelu_new", "gelu_pytorch_tanh")
    return [f"its activation is {config.activation_function}"] if odd else []


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, _of_llama, pairs_interleaved=True, rope_factors=True),
    "mistral": Architecture("llama", _llama, _of_llama, pairs_interleaved=True, rope_factors=True),
    "qwen2": Architecture("qwen2", _decoder, _of_qwen),
    "qwen3": Architecture("qwen3", _decoder, _of_qwen),
    "gemma": Architecture("gemma", _decoder, _of_gemma, norm_offset=1.0),
    "gemma2": Architecture("gemma2", _gemma2, _of_gemma2, norm_offset=1.0),
    "gemma3_text": Architecture("gemma3", _gemma2, _of_gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", _phi3, _plain_rope),
    "smollm3": Architecture("smollm3", _llama, _of_smollm3, pairs_interleaved=True),
    "gpt2": Architecture(
        "gpt2",
        _gpt2,
        _of_gpt2,
        transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    ),
}
"""By transformers' model_type. Each is shown equal by reading it back."""


def find_architecture(config: PreTrainedConfig, name: str) -> Architecture:
    """How this model goes into a GGUF. Raises ModelError where it does not go, or not as the same model."""
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ModelError(
            f"{name}: gguf: a {config.model_type} cannot be written here, and read back as a proof. Those that can: "
            f"{', '.join(ARCHITECTURES)}. Export merged, and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    if limits := found.limits(config):
        raise ModelError(
            f"{name}: gguf: llama.cpp would compute another model: {'; '.join(limits)}. Export merged instead."
        )
    return found


def tensor_names(architecture: Architecture, names: list[str], num_layers: int) -> dict[str, str]:
    """llama.cpp's name of each weight. Raises ModelError for one that it has no name for: a part would be lost."""
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(kind, num_layers)
    found = {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    if lost := [name for name, other in found.items() if other is None]:
        raise ModelError(
            f"gguf: llama.cpp has no name for {len(lost)} weights of a {architecture.name}, such as {lost[0]}"
        )
    return found


def model_names(architecture: Architecture, model: PreTrainedModel) -> dict[str, str]:
    """llama.cpp's name of each weight that is written: all but an output layer that is the embedding."""
    names = list(model.state_dict())
    if model.config.tie_word_embeddings:
        names.remove("lm_head.weight")
    return tensor_names(architecture, names, model.config.num_hidden_layers)
