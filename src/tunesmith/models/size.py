"""The size of a model, from its config and headers of its weight files, and the model without its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from tunesmith.errors import ModelError
from tunesmith.models import heads
from tunesmith.models.folder import read_tensors
from tunesmith.models.gguf import GgufHeader, read_gguf
from tunesmith.models.load import auto_class, load_config, wrap_errors
from tunesmith.models.resolve_model import ModelRef
from tunesmith.types import HeadName, JsonObject, Labels


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The sizes of a model that planning needs."""

    num_params: int
    """Weights that tied layers share count once."""
    hidden: int
    max_tokens: int
    """Most positions that the model was made for."""


UNBOUNDED = 1 << 20
"""max_tokens of a model that names no limit (ALiBi or relative positions, state spaces)."""

_AFTER_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Models that count positions from behind their pad token's id, so that the table's first rows are unused."""


def model_size(located: ModelRef) -> ModelSize:
    """The size of a model; no weight is read. Raises ModelError where its config does not say."""
    if located.kind == "gguf":
        return _gguf_size(located, read_gguf(located.path))
    outer = load_config(located)
    config = outer.get_text_config()
    tensors = read_tensors(located.path, located.name)
    # Older files of encoders hold the numbers of their positions among the weights.
    stored = sum(prod(info.shape) for info in tensors.values() if not info.dtype.startswith("I"))
    if getattr(config, "tie_word_embeddings", outer.tie_word_embeddings) and "lm_head.weight" in tensors:
        stored -= prod(tensors["lm_head.weight"].shape)
    return ModelSize(stored, int(config.hidden_size), _max_tokens(config))


def _max_tokens(config: Any) -> int:
    """A model with other positions for long texts (longrope: Phi-3, Phi-4-mini with long contexts) ends where
    those begin: where one text of a pass is longer, transformers gives its positions to all texts."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return UNBOUNDED
    settings = getattr(config, "rope_parameters", None) or {}
    of_layers = [settings] if "rope_type" in settings else settings.values()  # or by type of layer
    for rope in of_layers:
        if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope":
            key = "original_max_position_embeddings"
            limit = min(limit, rope.get(key) or getattr(config, key, None) or limit)
    return int(limit) - (config.pad_token_id + 1 if config.model_type in _AFTER_PADDING else 0)


def _gguf_size(located: ModelRef, header: GgufHeader) -> ModelSize:
    keys = [f"{header.architecture}.{key}" for key in ("embedding_length", "context_length")]
    if missing := [key for key in keys if not isinstance(header.metadata.get(key), int)]:
        raise ModelError(f"{located.path}: {missing[0]}: not in the file. Download it again, or use another one.")
    hidden, max_tokens = (header.metadata[key] for key in keys)
    return ModelSize(sum(prod(info.shape) for info in header.tensors.values()), hidden, max_tokens)


def meta_model(located: ModelRef, *, dtype: torch.dtype, head: HeadName, labels: Labels | None) -> PreTrainedModel:
    """The model that `load.load_model` would load, without numbers: call it with torch's default device meta.

    Raises ModelError where transformers cannot make it from its config alone.
    """
    config = _config_of_gguf(located) if located.is_gguf else load_config(located)
    for name, value in ({} if labels is None else heads.label_settings(labels)).items():
        setattr(config, name, value)
    with wrap_errors(located, "no model can be made of its config"):
        model: PreTrainedModel = auto_class(located, config, head).from_config(config, dtype=dtype)
    return model


def _config_of_gguf(located: ModelRef) -> PreTrainedConfig:
    """Sizes alone, from the header: transformers' reader takes a second, as it reads the vocabulary too."""
    header = read_gguf(located.path)
    names = GGUF_CONFIG_MAPPING.get(header.architecture)
    if names is None:
        raise ModelError(f"{located.path}: transformers cannot make a {header.architecture} of a GGUF file's header.")
    values: JsonObject = {"vocab_size": header.metadata.get("tokenizer.ggml.tokens")}
    for key, name in names.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if name is not None and isinstance(value, int):
            values[name] = value
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    sizes = {name: value for name, value in values.items() if value is not None}
    with wrap_errors(located, "no config can be made of its header"):
        return AutoConfig.for_model(header.architecture, **sizes)
