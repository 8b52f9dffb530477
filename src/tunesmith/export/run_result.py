"""The result of a run as input of an export: found, checked against its base, and loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.data.renderer import Renderer
from tunesmith.inference.load import make_renderer, refuse_needless, refuse_other_base, run_labels
from tunesmith.methods import METHODS
from tunesmith.methods.adapter_format import CONFIG, PREFIX, WEIGHTS
from tunesmith.models import load
from tunesmith.models.folder import read_safetensors, read_tensors
from tunesmith.models.load import model_kind, new_tokens_of
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import ModelRef, resolve_base, resolve_model
from tunesmith.models.special_tokens import resize_embeddings
from tunesmith.models.vision import is_seeing
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run
from tunesmith.types import Attachment, HeadName, JsonObject, Labels, ModelKind

_A = ".lora_A.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CLASSES = {"masked_token": "MaskedLM", "sequence": "SequenceClassification", "tokens": "TokenClassification"}


@dataclass(frozen=True)
class RunResult:
    """The result of a run, before its weights are loaded."""

    run: Run
    recipe: Recipe
    base: ModelRef
    """The model that was tuned."""
    folder: Path
    """The run's adapter or model folder."""
    tokenizer: PreTrainedTokenizerBase
    """Tokenizer with the chat template of training."""
    kind: ModelKind
    head: HeadName
    labels: Labels | None
    base_hashes: dict[str, str]
    """SHA-256 of the base's files, by name; empty if every weight was tuned."""
    unchecked: str = ""
    """Note about a result whose run recorded no hashes."""
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
    """(phase, done, total) of anything that takes seconds while it is exported."""

    @property
    def is_adapter(self) -> bool:
        return self.folder == self.run.adapter_path

    @property
    def quant(self) -> str | None:
        """Quantization type of the base during training; None: not quantized."""
        return METHODS[self.recipe.method.name].base_format.partition(" ")[0] or None

    @property
    def weights(self) -> ModelRef:
        """The model that is loaded first: the base under an adapter, or the result itself."""
        return self.base if self.is_adapter else self.located

    @property
    def located(self) -> ModelRef:
        return ModelRef("folder", self.folder, str(self.folder))

    @cached_property
    def renderer(self) -> Renderer:
        return make_renderer(self.recipe, self.tokenizer, self.kind)

    @cached_property
    def config(self) -> Any:
        config = load.load_config(self.weights)
        if self.is_adapter and (added := new_tokens_of(self.recipe.data.new_tokens, self.base).ids):
            text = config.get_text_config()
            text.vocab_size = max(text.vocab_size, max(added) + 1)
        return config

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the result."""
        return auto_class(self.head, self.kind, sees=is_seeing(self.config))

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """The widest dtype of the stored weights; float32 for a GGUF, which dequantizes to it."""
        if self.weights.is_gguf:
            return torch.float32
        stored = {tensor.dtype for tensor in read_tensors(self.weights.path, self.weights.name).values()}
        return next((dtype for name, dtype in _DTYPES.items() if name in stored), torch.float32)

    @cached_property
    def adapter_config(self) -> JsonObject:
        """The adapter's config in PEFT's format."""
        return read_config(self.folder)

    @property
    def is_low_rank(self) -> bool:
        """Whether nothing but low-rank paths was trained: no module whole, and no rows of new tokens."""
        trained_whole = ("modules_to_save", "trainable_token_indices")
        is_path = self.is_adapter and METHODS[self.recipe.method.name].low_rank
        return is_path and not any(self.adapter_config.get(key) for key in trained_whole)

    @property
    def adapted(self) -> list[str]:
        """Names of the layers with a low-rank path."""
        names = read_safetensors(self.folder / WEIGHTS)
        return [name.removeprefix(PREFIX).removesuffix(_A) for name in names if name.endswith(_A)]

    def load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, Attachment | None]:
        """The tuned model on the CPU with weights in `dtype`, and the adapter on it."""
        model = load.load_model(
            self.weights, dtype=dtype, device="cpu", head=self.head, labels=self.labels, seed=self.recipe.seed,
            tokenizer=self.tokenizer,
        )  # fmt: skip
        if not self.is_adapter:
            return model, None
        resize_embeddings(model, new_tokens_of(self.recipe.data.new_tokens, self.base))
        return model, METHODS[self.recipe.method.name].load_result(model, self.folder)

    def without_weights(self) -> PreTrainedModel:
        """The model on the meta device, with the generation config of its base."""
        with torch.device("meta"), silence_transformers():
            model: PreTrainedModel = getattr(transformers, self.auto_class).from_config(self.config)
        if (self.base.path / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(self.base.path)
        return model


def auto_class(head: HeadName, kind: ModelKind, *, sees: bool = False) -> str:
    """The class of transformers that loads a model with this head."""
    if head == "vector":
        return "AutoModel"
    if sees and head == "next_token":
        return "AutoModelForImageTextToText"
    writes = "Seq2SeqLM" if kind == "encoder_decoder" else "CausalLM"
    return f"AutoModelFor{_CLASSES.get(head, writes)}"


def read_config(folder: Path) -> JsonObject:
    """The config of an adapter in PEFT's format."""
    config: JsonObject = json.loads((folder / CONFIG).read_text("utf-8"))
    return config


def open_result(
    run: Run, *, offline: bool, on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> RunResult:
    """The result of a finished run.

    Raises:
        RunError: the run has no result yet, or its base has changed since.
        ModelError: the base is gone.
    """
    folder = run.result()
    unchecked = run.check_result(folder)
    recipe = run.recipe()
    hashes: dict[str, str] = {}
    if folder == run.adapter_path:
        base = resolve_base(recipe, offline=offline)
        hashes = load.fingerprint(base)
        refuse_other_base(run, base, hashes)
    else:
        refuse_needless(run.base, str(run.path))
        base = resolve_model(str(folder), offline=True)
    tokenizer = load.load_tokenizer(ModelRef("folder", folder, str(folder)), None)
    kind = model_kind(base)
    head = find_head(recipe.task, base, kind)
    return RunResult(
        run,
        recipe,
        base,
        folder,
        tokenizer,
        kind,
        head,
        run_labels(recipe.task, recipe.data),
        hashes,
        unchecked,
        on_progress,
    )


@torch.no_grad()
def tuned_tensors(model: PreTrainedModel, attachment: Attachment | None) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the tuned model by its name in a plain model: base plus delta in float32, not rounded.

    Takes the adapter off the model and unpacks quantized weights. Tied weights come under each of their names.
    Yields nothing if the adapter cannot be merged.
    """
    if attachment is not None:
        yield from attachment.merged_weights()
        return
    for name, weight in model.state_dict().items():
        yield name, weight.detach().float()
