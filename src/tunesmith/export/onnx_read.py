"""An ONNX model asked by onnxruntime, from the files of its folder alone."""

# N targets, T tokens, V vocabulary or classes

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tunesmith.data.render import Renderer
from tunesmith.environment import install_command
from tunesmith.errors import ModelError
from tunesmith.export.asked import ByRenderer, greedy
from tunesmith.models import load
from tunesmith.models.load import model_kind
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import ModelRef
from tunesmith.planning.before_rows import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch, HeadName, ModelKind

FILE = "model.onnx"
PREFIX = "model."
"""Before the names of weights in the file, which are those of transformers."""
NEEDED = ("onnxscript", "onnxruntime")


def check_installed() -> None:
    """Raises ModelError, with the way out, where the extra is not installed."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ModelError(
            f"onnx: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed. "
            f"`{install_command('onnx')}` brings what is needed."
        )


@dataclass(frozen=True)
class OnnxAsked(ByRenderer):
    """An open session."""

    session: Any
    head: HeadName
    decoder_start: int | None = None

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def has_types(self) -> bool:
        return "token_type_ids" in self._inputs

    @property
    def _inputs(self) -> set[str]:
        return {one.name for one in self.session.get_inputs()}

    def logits(self, batch: Batch) -> Tensor:
        given = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "token_type_ids": batch.types_BT}
        arrays = {name: tensor.numpy() for name, tensor in given.items() if tensor is not None and name in self._inputs}
        (logits,) = self.session.run(["logits"], arrays)
        found = torch.from_numpy(logits)
        return found if self.head == "sequence" else found.flatten(0, 1)[batch.predict_N]

    def answers(self, renderer: Renderer, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[str]:
        def next_v(ids: list[int]) -> Tensor:
            ids_1t = np.array([ids], np.int64)
            (logits,) = self.session.run(["logits"], {"input_ids": ids_1t, "attention_mask": np.ones_like(ids_1t)})
            return torch.from_numpy(logits[0, -1])

        return [greedy(next_v, renderer, prompt, num_tokens=num_tokens) for prompt in prompts]


@dataclass(frozen=True)
class OnnxLoaded:
    """What was exported, ready to be asked."""

    path: Path
    session: Any
    tokenizer: PreTrainedTokenizerBase
    located: ModelRef
    head: HeadName
    by: str

    @property
    def kind(self) -> ModelKind:
        return model_kind(self.located)

    def asked(self, renderer: Renderer) -> OnnxAsked:
        return OnnxAsked(self.session, self.head)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by its name in transformers; tied ones, which stand once in the file, by each of their names."""
        import onnx_ir

        found = onnx_ir.load(self.path).graph.initializers
        for names in _tied(load.load_config(self.located), self.head):
            for held in (name for name in names if f"{PREFIX}{name}" in found):
                tensor = torch.from_numpy(np.array(found[f"{PREFIX}{held}"].const_value.numpy()))
                yield from ((name, tensor) for name in names)
                break


def load_onnx(folder: Path, recipe: Recipe) -> OnnxLoaded:
    """A session on the processor. Raises ModelError where onnxruntime is missing."""
    check_installed()
    import onnxruntime

    located = ModelRef("folder", folder, str(folder))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / FILE, settings, providers=["CPUExecutionProvider"])
    tokenizer = load.load_tokenizer(located, None)
    head = find_head(recipe, located, model_kind(located))
    return OnnxLoaded(folder / FILE, session, tokenizer, located, head, f"onnxruntime {version('onnxruntime')}")


def _tied(config: Any, head: HeadName) -> list[list[str]]:
    """The names of every weight, those of one tensor together, by the config alone."""
    kinds = {"next_token": "CausalLM", "masked_token": "MaskedLM", "sequence": "SequenceClassification",
             "tokens": "TokenClassification"}  # fmt: skip
    with torch.device("meta"), silence_transformers():
        model = getattr(transformers, f"AutoModelFor{kinds[head]}").from_config(config)
    names: dict[int, list[str]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        names.setdefault(id(weight), []).append(name)
    return list(names.values())
