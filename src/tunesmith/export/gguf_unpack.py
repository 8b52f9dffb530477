"""GGUF files of architectures that transformers reads none of: sizes from the header, weights by llama.cpp's names.

What it has in common with the writer, the order of rows above all, it cannot find fault with: llama.cpp can, where it
is installed, and where it is not the export says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.export.gguf_models import ARCHITECTURES, model_names
from tunesmith.models.gguf import GgufHeader

UNKNOWN_TO_TRANSFORMERS = ("gemma", "smollm3")
"""By transformers' model_type, which is also their name in llama.cpp."""

_SIZES = {
    "vocab_size": "vocab_size",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}


@torch.no_grad()
def unpack(path: Path, header: GgufHeader, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a file. Raises ModelError for a weight that is missing, or one too many."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(header), dtype=dtype).eval()
    architecture, found = ARCHITECTURES[header.architecture], dict(tensors(path))
    names = model_names(architecture, model)
    for name, weight in model.state_dict().items():
        if (theirs := names.get(name)) is None:
            continue  # an output layer that is the embedding
        if theirs not in found:
            raise ModelError(f"{path.name}: {theirs} is missing")
        weight.copy_(architecture.unfitted(name, found.pop(theirs), model.config))
    if found:
        raise ModelError(f"{path.name}: {len(found)} tensors are no weights of it, such as {next(iter(found))}")
    return model


def _config(header: GgufHeader) -> Any:
    facts, name = header.metadata, header.architecture
    sizes = {ours: facts[f"{name}.{theirs}"] for theirs, ours in _SIZES.items()}
    return AutoConfig.for_model(
        name,
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": facts[f"{name}.rope.freq_base"]},
        tie_word_embeddings="output.weight" not in header.tensors,
        pad_token_id=facts.get("tokenizer.ggml.padding_token_id"),
    )


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file by llama.cpp's name, as float32."""
    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
