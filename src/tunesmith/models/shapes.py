"""A model without numbers: the layers that its config describes, as tensors that have a shape and a type and no memory.

Whoever makes one does so inside `torch._subclasses.fake_tensor.FakeTensorMode`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake, unset_fake_temporarily
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from tunesmith.errors import ModelError
from tunesmith.models import heads
from tunesmith.models.dropping import use_fast_dropout
from tunesmith.models.headers import read_gguf
from tunesmith.models.load import auto_class
from tunesmith.models.locate import Located
from tunesmith.models.norms import use_fast_norms
from tunesmith.models.source import blaming, load_config
from tunesmith.types import HeadName, Labels

__all__ = ["FakeTensorMode", "is_fake", "model_of_shapes", "unset_fake_temporarily"]


def model_of_shapes(
    located: Located, *, dtype: torch.dtype, head: HeadName, labels: Labels | None, kernels: str
) -> PreTrainedModel:
    """The model that `load.load_model` would load, with the norms it would compute with.

    Raises ModelError where transformers cannot make it from its config alone.
    """
    config = _config_of_gguf(located) if located.is_gguf else load_config(located)
    for name, value in ({} if labels is None else heads.label_settings(labels)).items():
        setattr(config, name, value)
    with blaming(located, "no model can be made of its config"):
        model: PreTrainedModel = auto_class(located, config, head).from_config(config, dtype=dtype)
    if kernels == "fast":
        with unset_fake_temporarily():
            use_fast_norms(model, with_numbers=_with_numbers)
        use_fast_dropout(model)
    return model


def _config_of_gguf(located: Located) -> PreTrainedConfig:
    """Sizes alone, from the header: transformers' own reader takes a second, since it reads the vocabulary too."""
    header = read_gguf(located.path)
    names = GGUF_CONFIG_MAPPING.get(header.architecture)
    if names is None:
        raise ModelError(f"{located.path}: transformers cannot make a {header.architecture} of a GGUF file's header.")
    values: dict[str, Any] = {"vocab_size": header.metadata.get("tokenizer.ggml.tokens")}
    for key, name in names.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if name is not None and isinstance(value, int):
            values[name] = value
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    sizes = {name: value for name, value in values.items() if value is not None}
    with blaming(located, "no config can be made of its header"):
        return AutoConfig.for_model(header.architecture, **sizes)


def _with_numbers(norm: nn.Module) -> nn.Module:
    """The same norm with a weight of ones, which can be asked how it rounds."""
    twin = copy.copy(norm)
    twin._parameters = {
        name: None if weight is None else nn.Parameter(torch.ones(weight.shape, dtype=weight.dtype))
        for name, weight in norm._parameters.items()
    }
    return twin
