"""What was exported, loaded as others load it: by transformers or peft from its files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
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

from tunesmith.errors import ModelError
from tunesmith.loading import run_labels
from tunesmith.methods import METHODS
from tunesmith.models import load, locate
from tunesmith.models.kind import model_kind
from tunesmith.models.locate import Located
from tunesmith.models.quiet import quiet
from tunesmith.planning.before_rows import find_head
from tunesmith.recipe.knobs import Recipe
from tunesmith.types import HeadName


@dataclass(frozen=True)
class Loaded:
    """What was exported, ready to be asked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    located: Located
    head: HeadName
    by: str
    """Whose code loaded it."""


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
        return Loaded(model, tokenizer, located, head, "tunesmith (peft is not installed)")
    from peft import PeftModel

    with quiet():
        PeftModel.from_pretrained(model, str(folder))  # which puts its layers into the model itself
    return Loaded(model.eval(), tokenizer, located, head, f"peft {version('peft')}")


LOADERS: dict[str, Callable[[Path, Recipe], Loaded]] = {"merged": load_merged, "adapter": load_adapter}
