"""What was exported, loaded as others load it: by transformers or peft from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tunesmith.errors import ModelError
from tunesmith.export.asked import Loaded, dtype_of
from tunesmith.export.gguf_read import load_gguf, load_gguf_adapter
from tunesmith.export.llama_cpp_read import LLAMA_CPP, LlamaLoaded, load_llama_cpp
from tunesmith.export.onnx_read import OnnxLoaded, load_onnx
from tunesmith.export.peft_read import PromptLoaded
from tunesmith.inference.load import run_labels
from tunesmith.methods import METHODS
from tunesmith.models.load import load_model, load_tokenizer, model_kind, new_tokens_of
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.models.special_tokens import resize_embeddings
from tunesmith.planning.before_rows import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.types import HeadName


def load_merged(folder: Path, recipe: Recipe) -> Loaded:
    """The model by AutoModel….from_pretrained alone. Raises ModelError for a weight that is not in its files."""
    located = resolve_model(str(folder), offline=True)
    head = find_head(recipe, located, model_kind(located))
    classes: Mapping[HeadName, Any] = {
        "next_token": AutoModelForSeq2SeqLM if model_kind(located) == "encoder_decoder" else AutoModelForCausalLM,
        "masked_token": AutoModelForMaskedLM,
        "sequence": AutoModelForSequenceClassification,
        "tokens": AutoModelForTokenClassification,
    }
    with silence_transformers():
        model, found = classes[head].from_pretrained(
            folder, dtype=dtype_of(recipe), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])})
    if wrong:
        raise ModelError(f"{folder.name}: {len(wrong)} weights do not fit the model, such as {wrong[0]}")
    return Loaded(model, tokenizer, located, head, f"transformers {version('transformers')}")


def load_adapter(folder: Path, recipe: Recipe) -> Loaded:
    """The base that the adapter names, and the adapter on it: by peft, as others do, where it is installed."""
    located = resolve_base(recipe, offline=True)
    head = find_head(recipe, located, model_kind(located))
    tokenizer = load_tokenizer(ModelRef("folder", folder, str(folder)), None)
    model = load_model(
        located, dtype=dtype_of(recipe), device="cpu", head=head, labels=run_labels(recipe), seed=recipe.seed,
        tokenizer=tokenizer,
    )  # fmt: skip
    resize_embeddings(model, new_tokens_of(recipe, located))
    if find_spec("peft") is None:
        METHODS["lora"].load_result(model, folder)
        return Loaded(model, tokenizer, located, head, "tunesmith (peft is not installed)", is_plain=False)
    from peft import PeftModel

    with silence_transformers():
        wrapped = PeftModel.from_pretrained(model, str(folder))  # which puts its layers into the model itself
    by = f"peft {version('peft')}"
    if wrapped.active_peft_config.is_prompt_learning:
        return PromptLoaded(model.eval(), tokenizer, located, head, by, is_plain=False, wrapped=wrapped.eval())
    return Loaded(model.eval(), tokenizer, located, head, by, is_plain=False)


LOADERS: dict[str, Callable[[Path, Recipe], Loaded | OnnxLoaded]] = {
    "merged": load_merged,
    "adapter": load_adapter,
    "gguf": load_gguf,
    "gguf-adapter": load_gguf_adapter,
    "onnx": load_onnx,
}


def load(name: str, folder: Path, recipe: Recipe, *, base: Path | None = None) -> Loaded | OnnxLoaded | LlamaLoaded:
    """What was exported, by one of LOADERS or by LLAMA_CPP, which puts an adapter on the file `base`."""
    return load_llama_cpp(folder, recipe, base) if name == LLAMA_CPP else LOADERS[name](folder, recipe)
