"""The interface of an export target: its options and tolerances, and the model that is loaded from it again."""

# N targets, V vocabulary or classes, B rows, T tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunesmith.inference.load import has_token_types
from tunesmith.models.forward import hidden_at_targets, logits_at_targets, sequence_logits
from tunesmith.models.modes import eval_mode
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch, HeadName, JsonObject, ModelKind

if TYPE_CHECKING:
    from tunesmith.export.run_result import RunResult

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of an export. A target refuses those that it does not read."""

    dtype: str = "auto"
    """merged: the dtype of the weights. auto: the first that agrees with the tuned model, beginning with the
    base's dtype (bfloat16 if the base is a GGUF)."""
    quant: str = "f16"
    """gguf, ollama: how matrices are stored."""
    license: str | None = None
    """License in the model card."""


@dataclass(frozen=True, slots=True)
class Tolerances:
    """Largest allowed distances of an export from the tuned model."""

    kl: float
    """Mean KL divergence of the next token or class, in nats."""
    loss: float
    """Change of the loss on the compared rows, in nats."""
    carried: float
    """Distance from 1 of the share of the change from the base that the export keeps."""


EXACT = Tolerances(kl=1e-6, loss=1e-4, carried=0.01)
"""float32 on both sides: only the order of additions differs."""
ROUNDED = Tolerances(kl=5e-3, loss=0.02, carried=0.2)
"""16-bit weights. Measured: merging SmolLM2 into bfloat16 gives KL 7e-4. 0.02 nats of loss: trap A2 of
docs/inside/correctness.md. After three steps rounding was up to 6 % of the effect."""
GGUF_EXACT = Tolerances(kl=1e-3, loss=0.02, carried=0.05)
"""F32 and F16 in a GGUF (trap A14)."""
QUANTIZED = Tolerances(kl=2e-2, loss=0.05, carried=0.2)
"""8 bits: blocks of 32 share a scale."""
SIX_BITS = Tolerances(kl=5e-2, loss=0.05, carried=0.2)
FIVE_BITS = Tolerances(kl=0.25, loss=0.15, carried=0.3)
FOUR_BITS = Tolerances(kl=0.5, loss=0.2, carried=0.3)
"""About twice the values of SmolLM2-135M (docs/inside/EXPERIMENTS.md). A lost adapter carries nothing."""


@dataclass(frozen=True)
class ExportedModel:
    """A loaded model as the check queries it. Subclasses compute `logits`."""

    tokenizer: PreTrainedTokenizerBase
    kind: ModelKind
    head: HeadName
    loaded_by: str
    """Library and version."""

    @property
    def has_types(self) -> bool:
        """Whether the model reads token types."""
        return False

    @property
    def decoder_start(self) -> int | None:
        """First token of the decoder of an encoder–decoder."""
        return None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def logits(self, batch: Batch) -> Tensor:
        """Logits [N, V] float32 on the CPU at the targets of a batch of one padded row."""
        raise NotImplementedError

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, without special tokens."""
        backend = self.tokenizer.backend_tokenizer
        return [list(encoding.ids) for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]


@dataclass(frozen=True)
class TorchModel(ExportedModel):
    """A model of transformers."""

    model: PreTrainedModel

    @property
    def has_types(self) -> bool:
        return has_token_types(self.model, self.tokenizer)

    @property
    def decoder_start(self) -> int | None:
        return getattr(self.model.config, "decoder_start_token_id", None)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def logits(self, batch: Batch) -> Tensor:
        forward = sequence_logits if self.head == "sequence" else logits_at_targets
        with eval_mode(self.model):
            if self.head == "vector":
                return hidden_at_targets(self.model, batch).float().cpu()
            return forward(self.model, batch).float().cpu()


@dataclass(frozen=True, slots=True)
class Computing:
    """Device and dtype in which an export is computed for the comparison."""

    device: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        chosen: torch.dtype = getattr(torch, self.precision)
        return chosen


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """One target of `tunesmith export --to`."""

    name: str
    doc: str
    check: Callable[[RunResult, ExportOptions], list[str]]
    """(result, options) -> notes. Raises for what this target cannot carry, before weights are loaded."""
    write: Callable[[RunResult, Path, ExportOptions], list[str]]
    """(result, folder, options) -> notes. Fills an empty folder."""
    load: Callable[[Path, Recipe, Computing], ExportedModel]
    """(folder, recipe, computing) -> the model, from the exported files alone (an adapter: on its base)."""
    tolerances: Callable[[RunResult, ExportOptions], Tolerances]
    card: Callable[[RunResult, Path, ExportOptions], JsonObject]
    """Fields of the model card: library, relation, "use" as (language, code), "servers"."""
    reads: tuple[str, ...]
    """Names of the options that it reads besides the license."""
    quants: tuple[str, ...] = ()
    """Values of --quant."""
    dtypes: Callable[[RunResult, ExportOptions], tuple[str, ...]] = lambda result, options: ("",)
    """(result, options) -> dtypes that the weights may be written in, tried in this order; "": of none."""
    on_card: bool = True
    """Whether what loads it can compute on a card."""
    check_base: Callable[[Any, str, ExportOptions], None] = lambda config, name, options: None
    """(config of the base, its name, options); raises ModelError for one that this target cannot carry."""
