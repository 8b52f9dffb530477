"""How large a model is, from its config and the headers of its weight files."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

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
    """Of encoder and decoder together."""
    hidden: int
    vocab_size: int
    max_tokens: int
    """Most positions that the model was made for."""


UNBOUNDED = 1 << 20
"""max_tokens of a model that names no limit (ALiBi or relative positions, state spaces)."""

_AFTER_PADDING = (
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Models that count positions from behind their pad token's id, so that the first rows of the table are never used."""


def size(located: Located) -> ModelSize:
    """The size of a model; no weight is read. Raises ModelError where its config does not say."""
    if located.kind == "gguf":
        return _gguf_size(located, read_gguf(located.path))
    from tunesmith.models.source import load_config

    config = load_config(located).get_text_config()
    tensors = read_tensors(located.path, located.name)
    # Older files of encoders hold the numbers of their positions among the weights.
    stored = sum(prod(info.shape) for info in tensors.values() if not info.dtype.startswith("I"))
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        stored -= prod(tensors["lm_head.weight"].shape)
    return ModelSize(
        num_params=stored,
        num_layers=_num_layers(config),
        hidden=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_tokens=_max_tokens(config),
    )


def _num_layers(config: Any) -> int:
    decoder = ("num_decoder_layers", "decoder_layers") if config.is_encoder_decoder else ()
    return int(config.num_hidden_layers) + sum(getattr(config, name, 0) for name in decoder)


def _max_tokens(config: Any) -> int:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return UNBOUNDED
    return int(limit) - (config.pad_token_id + 1 if config.model_type in _AFTER_PADDING else 0)


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
