"""What was written into a GGUF, read back as llama.cpp reads it."""

# O outputs, I inputs, R rank

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.export.gguf_models import find_architecture, model_names
from tunesmith.models.headers import read_gguf

TEMPLATE = "chat_template.jinja"
"""Beside an adapter, which carries no tokenizer."""


@torch.no_grad()
def add_adapter(model: PreTrainedModel, path: Path, config: PreTrainedConfig) -> None:
    """Add what the file says to the weights of its base, as llama.cpp does it while it computes.

    Raises ModelError for a tensor that is beside no weight, or has another size.
    """
    header, architecture = read_gguf(path), find_architecture(config, path.name)
    if header.metadata.get("general.type") != "adapter" or header.architecture != architecture.name:
        raise ModelError(f"{path.name}: not an adapter of a {architecture.name}")
    weights, names = model.state_dict(), model_names(architecture, model)
    alpha = float(header.metadata["adapter.lora.alpha"])
    found = dict(_tensors(path))
    for name, other in names.items():
        a_RI, b_OR = (found.pop(other + end, None) for end in (".lora_a", ".lora_b"))
        if a_RI is None or b_OR is None:
            continue
        delta_OI = (b_OR @ a_RI) * (alpha / b_OR.shape[1])
        weight = weights[name]
        weight.copy_(weight.float() + architecture.unfitted(name, delta_OI, config))
    if found:
        raise ModelError(f"{path.name}: {len(found)} tensors are beside no weight, such as {next(iter(found))}")


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    for tensor in gguf.GGUFReader(path).tensors:
        yield tensor.name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
