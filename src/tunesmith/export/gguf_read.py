"""What was written into a GGUF, read back as llama.cpp reads it."""

# O outputs, I inputs, R rank

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import normalizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tunesmith.data.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.export.asked import Asked, Asks, Loaded, TorchAsked, dtype_of
from tunesmith.export.gguf_encoders import ENCODERS, pooling_of, unpack_encoder
from tunesmith.export.gguf_models import REPACKED, find_architecture, model_names
from tunesmith.export.gguf_unpack import UNKNOWN_TO_TRANSFORMERS, tensors, unpack
from tunesmith.export.gguf_word_pieces import read_word_pieces
from tunesmith.models import load
from tunesmith.models.gguf import GgufHeader, fix_tokenizer, read_gguf
from tunesmith.models.load import pretrained_args, wrap_errors
from tunesmith.models.pooling import PoolingKind
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.recipe.schema import Recipe
from tunesmith.types import ModelKind

UNREAD = "transformers reads no such file"
TEMPLATE = "chat_template.jinja"
"""Beside an adapter, which carries no tokenizer."""


def load_gguf(folder: Path, recipe: Recipe) -> Loaded:
    """The weights of a GGUF unpacked by transformers; what its reader leaves out of the config is read from the file's
    own header, as llama.cpp does."""
    path = next(folder.glob("*.gguf"))
    located = resolve_model(str(path), offline=True)
    header = read_gguf(path)
    if header.architecture in ENCODERS:
        return _load_encoder(located, header, recipe)
    if header.architecture in UNKNOWN_TO_TRANSFORMERS:
        with wrap_errors(located, "its weights cannot be read"):
            model = unpack(path, header, dtype_of(recipe))
        return Loaded(model, read_tokenizer(located), located, "next_token", f"tunesmith ({UNREAD})")
    config = load.load_config(located)
    _complete(config, header)
    with wrap_errors(located, "its weights cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            **pretrained_args(located), config=config, dtype=dtype_of(recipe), output_loading_info=True
        )
    if found["missing_keys"]:
        raise ModelError(f"{path.name}: {len(found['missing_keys'])} weights are missing")
    if REPACKED in header.tensors:
        factors = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == REPACKED).data
        model.base_model.rotary_emb.inv_freq.div_(torch.from_numpy(factors.copy()))
    return Loaded(model, read_tokenizer(located), located, "next_token", f"transformers {version('transformers')}")


@dataclass(frozen=True)
class EncoderLoaded(Loaded):
    """An encoder, whose vectors are pooled as the file says, or with a head that answers with classes."""

    pooling: PoolingKind | None = None

    @property
    def kind(self) -> ModelKind:
        return "encoder"

    def asked(self, renderer: Renderer) -> Asked:
        return TorchAsked(self.model, renderer, self.head, self.pooling or "mean")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        body = f"{self.model.base_model_prefix}." if self.head == "vector" else ""
        yield from ((name, weight) for name, weight in super().weights() if name.startswith(body))


def _load_encoder(located: ModelRef, header: GgufHeader, recipe: Recipe) -> EncoderLoaded:
    with wrap_errors(located, "its weights cannot be read"):
        model = unpack_encoder(located.path, header, dtype_of(recipe))
    pooling = pooling_of(header)
    head: Asks = "vector" if pooling else "sequence"
    return EncoderLoaded(model, read_tokenizer(located), located, head, f"tunesmith ({UNREAD})", pooling=pooling)


def read_tokenizer(located: ModelRef) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF, which splits text as llama.cpp does."""
    facts = read_gguf(located.path).metadata
    if facts.get("tokenizer.ggml.model") == "bert":
        return read_word_pieces(located.path)
    if facts["general.architecture"] in UNKNOWN_TO_TRANSFORMERS:
        with wrap_errors(located, "its tokenizer cannot be used"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(**pretrained_args(located))
        fix_tokenizer(tokenizer, located.path, lambda text: None)
    else:
        tokenizer = load.load_tokenizer(located, None)
    if facts.get("tokenizer.ggml.model") == "llama":
        _split_as_llama_cpp(tokenizer, prefix=bool(facts.get("tokenizer.ggml.add_space_prefix", True)))
    return tokenizer


def load_gguf_adapter(folder: Path, recipe: Recipe) -> Loaded:
    """The base that was tuned, and on it what the file adds; its own tokenizer, and the template beside the file."""
    located = resolve_base(recipe, offline=True)
    template = folder / TEMPLATE
    tokenizer = load.load_tokenizer(located, str(template) if template.is_file() else None)
    model = load.load_model(located, dtype=dtype_of(recipe), device="cpu", head="next_token", tokenizer=tokenizer)
    path = next(folder.glob("*.gguf"))
    add_adapter(model, path, load.load_config(located))
    return Loaded(model, tokenizer, located, "next_token", "tunesmith, as llama.cpp adds it")


def _split_as_llama_cpp(tokenizer: PreTrainedTokenizerBase, *, prefix: bool) -> None:
    """llama.cpp puts a blank in front of every stretch of text between control tokens, or of none; transformers' reader
    guesses by the architecture."""
    blanks = [normalizers.Replace(" ", "▁")]
    steps = [normalizers.Prepend("▁"), *blanks] if prefix else blanks
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.backend_tokenizer.pre_tokenizer = None


_UNREAD = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def _complete(config: Any, header: GgufHeader) -> None:
    facts = {key: value for key, value in header.metadata.items() if key.startswith(f"{header.architecture}.")}
    facts = {key.partition(".")[2]: value for key, value in facts.items()}
    for key, name in _UNREAD.items():
        if hasattr(config, name):
            setattr(config, name, facts.get(key))
    if header.architecture == "gpt2":
        config.n_positions = facts["context_length"]
    if header.architecture in ("gemma2", "gemma3"):
        config.query_pre_attn_scalar = facts["attention.key_length"]


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
    found = dict(tensors(path))
    for name, other in names.items():
        a_RI, b_OR = (found.pop(other + end, None) for end in (".lora_a", ".lora_b"))
        if a_RI is None or b_OR is None:
            continue
        delta_OI = (b_OR @ a_RI) * (alpha / b_OR.shape[1])
        weight = weights[name]
        weight.copy_(weight.float() + architecture.unfitted(name, delta_OI, config))
    if found:
        raise ModelError(f"{path.name}: {len(found)} tensors are beside no weight, such as {next(iter(found))}")
