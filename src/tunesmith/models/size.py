"""How large a model is, from its config and the headers of its weight files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tunesmith.errors import ModelError
from tunesmith.models.folder import read_tensors
from tunesmith.models.headers import GgufHeader, read_gguf
from tunesmith.models.locate import Located


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What planning needs to know of a model."""

    num_params: int
    """Weights that tied layers share count once."""
    num_layers: int
    hidden: int
    vocab_size: int
    max_tokens: int
    """Most positions that the model was made for."""


UNBOUNDED = 1 << 20
"""max_tokens of a model that names no limit (ALiBi positions, state spaces)."""


def size(located: Located) -> ModelSize:
    """The size of a model; no weight is read. Raises ModelError where its config does not say."""
    if located.kind == "gguf":
        return _gguf_size(located, read_gguf(located.path))
    from tunesmith.models.load import load_config

    config = load_config(located).get_text_config()
    tensors = read_tensors(located.path, located.name)
    stored = sum(prod(info.shape) for info in tensors.values())
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        stored -= prod(tensors["lm_head.weight"].shape)
    return ModelSize(
        num_params=stored,
        num_layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_tokens=int(getattr(config, "max_position_embeddings", None) or UNBOUNDED),
    )


def _gguf_size(located: Located, header: GgufHeader) -> ModelSize:
    name = header.architecture

    def number(key: str) -> int:
        value = header.metadata.get(f"{name}.{key}")
        if not isinstance(value, int):
            raise ModelError(f"{located.path}: {name}.{key}: not in the file. Download it again, or use another one.")
        return value

    tokens = header.metadata.get("tokenizer.ggml.tokens")
    return ModelSize(
        num_params=sum(prod(info.shape) for info in header.tensors.values()),
        num_layers=number("block_count"),
        hidden=number("embedding_length"),
        vocab_size=tokens if isinstance(tokens, int) else number("vocab_size"),
        max_tokens=number("context_length"),
    )
