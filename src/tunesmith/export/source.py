"""The result of a run as what is to be exported: found, checked against what it was tuned from, and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.render import Renderer
from tunesmith.errors import RunError
from tunesmith.formatting import command
from tunesmith.inference.load import make_renderer, refuse_needless, refuse_other_base, run_labels
from tunesmith.methods import METHODS
from tunesmith.methods.patterns import CONFIG
from tunesmith.methods.peft_format import WEIGHTS
from tunesmith.methods.quantize import unpack_base
from tunesmith.models import load
from tunesmith.models.folder import read_safetensors, read_tensors
from tunesmith.models.load import model_kind, new_tokens_of
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.models.special_tokens import resize_embeddings
from tunesmith.planning.before_rows import find_head
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs.folder import Run
from tunesmith.types import Attachment, HeadName, Labels, ModelKind

_A = ".lora_A.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Source:
    """What a finished run made, before its weights are loaded."""

    run: Run
    recipe: Recipe
    base: ModelRef
    """What was tuned."""
    result: Path
    """The run's adapter or model folder."""
    tokenizer: PreTrainedTokenizerBase
    """With the template that was tuned with."""
    kind: ModelKind
    head: HeadName
    labels: Labels | None
    base_hashes: dict[str, str]
    """SHA-256 of the base's files, by name; empty where every weight was tuned."""
    merges_into_dequantized: bool = False
    """Of a base that was quantised for tuning, take what its quantised weights unpack to."""
    unchecked: str = ""
    """What to say of a result whose run noted no hashes."""

    @property
    def is_adapter(self) -> bool:
        return self.result == self.run.adapter_path

    @property
    def quant(self) -> str | None:
        """What the base was quantised to for tuning; None: it was tuned on as it is."""
        return METHODS[self.recipe.method.name].base_format(self.recipe.method).partition(" ")[0] or None

    @property
    def is_off_its_base(self) -> bool:
        """Whether what is exported has another base than the one that was tuned on: not quantised."""
        return self.quant is not None and not self.merges_into_dequantized

    @property
    def weights(self) -> ModelRef:
        """The model that is loaded first: the base under an adapter, or the result itself."""
        return self.base if self.is_adapter else self.result_located

    @property
    def result_located(self) -> ModelRef:
        return ModelRef("folder", self.result, str(self.result))

    @cached_property
    def renderer(self) -> Renderer:
        return make_renderer(self.recipe, self.tokenizer, self.kind)

    @cached_property
    def config(self) -> Any:
        config = load.load_config(self.weights)
        if self.is_adapter and (added := new_tokens_of(self.recipe, self.base).ids):
            text = config.get_text_config()
            text.vocab_size = max(text.vocab_size, max(added) + 1)
        return config

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """What the weights are stored in: the widest of the kinds found; float32 for a GGUF, whose blocks become it."""
        if self.weights.is_gguf:
            return torch.float32
        found = {tensor.dtype for tensor in read_tensors(self.weights.path, self.weights.name).values()}
        return next((dtype for name, dtype in _DTYPES.items() if name in found), torch.float32)

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """In PEFT's words."""
        return read_config(self.result)

    @property
    def adapted(self) -> list[str]:
        """Names of the layers with a low-rank path."""
        tensors = read_safetensors(self.result / WEIGHTS)
        return [name.removeprefix("base_model.model.").removesuffix(_A) for name in tensors if name.endswith(_A)]

    def load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, Attachment | None]:
        """The tuned model on the CPU, its weights in `dtype`, and the adapter that sits on it."""
        as_tuned_on = getattr(torch, resolved(self.recipe.precision))
        model = load.load_model(
            self.weights, dtype=as_tuned_on if self.merges_into_dequantized else dtype, device="cpu", head=self.head,
            labels=self.labels, seed=self.recipe.seed, tokenizer=self.tokenizer,
        )  # fmt: skip
        if self.is_adapter:
            resize_embeddings(model, new_tokens_of(self.recipe, self.base))
        if self.merges_into_dequantized:
            METHODS[self.recipe.method.name].prepare_base(model, self.recipe.method, device="cpu")
            unpack_base(model).to(dtype)
        if not self.is_adapter:
            return model, None
        return model, METHODS[self.recipe.method.name].load_result(model, self.result)


def read_config(folder: Path) -> dict[str, Any]:
    """The config of an adapter in PEFT's format."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
    return config


def open_source(run: Run, *, offline: bool) -> Source:
    """What a finished run made.

    Raises:
        RunError: the run has no result yet, or its base is not what it was tuned from.
        ModelError: the base is gone.
    """
    result = next((path for path in (run.adapter_path, run.model_path) if path.exists()), None)
    if result is None:
        raise RunError(f"{run.path}: no result yet, so nothing to export. Go on with: {command('resume', run.path)}")
    unchecked = run.check_result(result)
    recipe = run.recipe()
    if result == run.adapter_path:
        base = resolve_base(recipe, offline=offline)
        hashes = load.fingerprint(base)
        refuse_other_base(run, base, hashes)
    else:
        refuse_needless(run.base, str(run.path))
        base = resolve_model(str(result), offline=True)
        hashes = {}
    tokenizer = load.load_tokenizer(ModelRef("folder", result, str(result)), None)
    kind = model_kind(base)
    head = find_head(recipe, base, kind)
    labels = run_labels(recipe)
    return Source(run, recipe, base, result, tokenizer, kind, head, labels, hashes, unchecked=unchecked)


@torch.no_grad()
def tuned_tensors(model: PreTrainedModel, attachment: Attachment | None) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the tuned model by its name in a plain model, float32: base plus delta, never rounded.

    The adapter is taken off the model, and packed weights are unpacked. Tied weights come under each of their names.
    None where it is no change of weights.
    """
    if attachment is not None:
        yield from attachment.merged_weights()
        return
    for name, weight in model.state_dict().items():
        yield name, weight.detach().float()
