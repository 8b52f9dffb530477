"""What was exported, loaded as others load it: by transformers or peft from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import normalizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tunesmith.data.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.export.asked import Asked, TorchAsked
from tunesmith.export.gguf_models import REPACKED
from tunesmith.export.gguf_read import TEMPLATE, add_adapter
from tunesmith.export.onnx_read import OnnxLoaded, load_onnx
from tunesmith.loading import run_labels
from tunesmith.methods import METHODS
from tunesmith.models import load, locate
from tunesmith.models.headers import GgufHeader, read_gguf
from tunesmith.models.kind import model_kind
from tunesmith.models.locate import Located
from tunesmith.models.quiet import quiet
from tunesmith.models.source import blaming, source
from tunesmith.planning.before_rows import find_head
from tunesmith.recipe.knobs import Recipe
from tunesmith.types import HeadName, ModelKind


@dataclass(frozen=True)
class Loaded:
    """What was exported, ready to be asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    located: Located
    head: HeadName
    by: str
    """Whose code loaded it."""
    is_plain: bool = True
    """Whether the weights are those of a plain model, without an adapter beside them."""

    @property
    def kind(self) -> ModelKind:
        return model_kind(self.located)

    def asked(self, renderer: Renderer) -> Asked:
        return TorchAsked(self.model, renderer, self.head)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name in a plain model; none where adapters stand beside them."""
        if self.is_plain:
            yield from self.model.state_dict().items()


def _dtype(recipe: Recipe) -> torch.dtype:
    """What the run computed in: a difference is then one of weights."""
    found: torch.dtype = getattr(torch, recipe.precision)
    return found


def load_merged(folder: Path, recipe: Recipe) -> Loaded:
    """The model by AutoModel….from_pretrained alone. Raises ModelError for a weight that is not in its files."""
    located = locate.locate(str(folder), offline=True)
    head = find_head(recipe, located, model_kind(located))
    classes: Mapping[HeadName, Any] = {
        "next_token": AutoModelForSeq2SeqLM if model_kind(located) == "encoder_decoder" else AutoModelForCausalLM,
        "masked_token": AutoModelForMaskedLM,
        "sequence": AutoModelForSequenceClassification,
        "tokens": AutoModelForTokenClassification,
    }
    with quiet():
        model, found = classes[head].from_pretrained(
            folder, dtype=_dtype(recipe), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])})
    if wrong:
        raise ModelError(f"{folder.name}: {len(wrong)} weights do not fit the model, such as {wrong[0]}")
    return Loaded(model, tokenizer, located, head, f"transformers {version('transformers')}")


def load_adapter(folder: Path, recipe: Recipe) -> Loaded:
    """The base that the adapter names, and the adapter on it: by peft, as others do, where it is installed."""
    located = locate.locate(recipe.model, revision=recipe.revision, offline=True)
    head = find_head(recipe, located, model_kind(located))
    tokenizer = load.load_tokenizer(Located("folder", folder, str(folder)), None)
    model = load.load_model(
        located, dtype=_dtype(recipe), device="cpu", head=head, labels=run_labels(recipe), seed=recipe.seed,
        tokenizer=tokenizer,
    )  # fmt: skip
    if find_spec("peft") is None:
        METHODS["lora"].load_result(model, folder)
        return Loaded(model, tokenizer, located, head, "tunesmith (peft is not installed)", is_plain=False)
    from peft import PeftModel

    with quiet():
        PeftModel.from_pretrained(model, str(folder))  # which puts its layers into the model itself
    return Loaded(model.eval(), tokenizer, located, head, f"peft {version('peft')}", is_plain=False)


def load_gguf(folder: Path, recipe: Recipe) -> Loaded:
    """The weights of a GGUF unpacked by transformers; what its reader leaves out of the config is read from the file's
    own header, as llama.cpp does."""
    path = next(folder.glob("*.gguf"))
    located = locate.locate(str(path), offline=True)
    header = read_gguf(path)
    config = load.load_config(located)
    _complete(config, header)
    with blaming(located, "its weights cannot be loaded"):
        model, found = AutoModelForCausalLM.from_pretrained(
            **source(located), config=config, dtype=_dtype(recipe), output_loading_info=True
        )
    if found["missing_keys"]:
        raise ModelError(f"{path.name}: {len(found['missing_keys'])} weights are missing")
    if REPACKED in header.tensors:
        factors = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == REPACKED).data
        model.base_model.rotary_emb.inv_freq.div_(torch.from_numpy(factors.copy()))
    tokenizer = load.load_tokenizer(located, None)
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        _split_as_llama_cpp(tokenizer, prefix=bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True)))
    return Loaded(model, tokenizer, located, "next_token", f"transformers {version('transformers')}")


def load_gguf_adapter(folder: Path, recipe: Recipe) -> Loaded:
    """The base that was tuned, and on it what the file adds; its own tokenizer, and the template beside the file."""
    located = locate.locate(recipe.model, revision=recipe.revision, offline=True)
    template = folder / TEMPLATE
    tokenizer = load.load_tokenizer(located, str(template) if template.is_file() else None)
    model = load.load_model(located, dtype=_dtype(recipe), device="cpu", head="next_token", tokenizer=tokenizer)
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


LOADERS: dict[str, Callable[[Path, Recipe], Loaded | OnnxLoaded]] = {
    "merged": load_merged,
    "adapter": load_adapter,
    "gguf": load_gguf,
    "gguf-adapter": load_gguf_adapter,
    "onnx": load_onnx,
}
