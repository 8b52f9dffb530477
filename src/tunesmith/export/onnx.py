"""`onnx`: a graph for onnxruntime on processors, phones and in browsers, with its tokenizer.

Traced by torch's own exporter.
"""

# B rows, T tokens, D hidden size, C classes, N targets, V vocabulary or classes

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from tunesmith.environment.packages import install_command
from tunesmith.errors import ModelError
from tunesmith.export.run_result import RunResult
from tunesmith.export.target import EXACT, Computing, ExportedModel, ExportOptions, ExportTarget
from tunesmith.inference.load import has_token_types
from tunesmith.models import heads, load
from tunesmith.models.forward import has_cache
from tunesmith.models.heads import pools_last
from tunesmith.models.load import model_kind
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.save import save_generation_config, save_tokenizer
from tunesmith.models.special_tokens import with_pad_token
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch, JsonObject

FILE = "model.onnx"
KNOWN = (
    "llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi3", "opt", "gpt_neox", "olmo2",
    "smollm3", "granite", "cohere", "bloom", "falcon", "bert", "roberta", "distilbert", "electra", "deberta-v2",
    "modernbert", "mpnet",
)  # fmt: skip
"""transformers' model types that tests/export/test_onnx.py shows equal."""
MAX_FILE_BYTES = 1_900_000_000
"""A protobuf ends at 2 GiB; larger weights are stored next to the graph."""
NEEDED = ("onnxscript", "onnxruntime")


class _Graph(nn.Module):
    """The traced function: from tokens to logits, without a cache."""

    def __init__(self, model: PreTrainedModel, *, pools: bool) -> None:
        super().__init__()
        self.model = model
        self._pools = pools
        self._options = {"use_cache": False} if has_cache(type(model).forward) else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **self._options}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if not self._pools:
            logits: Tensor = self.model(**inputs).logits
            return logits
        # The mask gives the last token: transformers looks for the pad id, which may also end a text.
        scores_BTC: Tensor = self.model.score(self.model.base_model(**inputs).last_hidden_state)
        last_B = attention_mask.sum(-1) - 1
        return scores_BTC[torch.arange(scores_BTC.shape[0]), last_B]


def _check_base(config: PreTrainedConfig, name: str, options: ExportOptions) -> None:
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise ModelError(
            f"onnx: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed. "
            f"`{install_command('onnx')}` installs all that is needed."
        )
    if config.model_type not in KNOWN:
        raise ModelError(
            f"{name}: onnx: a {config.model_type} has not been shown to compute the same there. "
            f"Those that do: {', '.join(KNOWN)}. Export merged instead."
        )


def _check(result: RunResult, options: ExportOptions) -> list[str]:
    _check_base(result.config, result.weights.name, options)
    if result.head == "vector":
        raise ModelError(f"{result.weights.name}: onnx: a graph of vectors is not made here. Export merged instead.")
    return [] if result.kind == "encoder" else ["it has no cache: each new token reads the whole text again"]


def _write(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    model, attachment = result.load(torch.float32)
    if attachment is not None:
        attachment.merge()
    is_large = sum(weight.numel() * weight.element_size() for weight in model.parameters()) > MAX_FILE_BYTES
    pools = result.head == "sequence" and pools_last(model)
    ids_BT = torch.arange(14).reshape(2, 7) % model.config.vocab_size  # traced on 2 rows of 7; both stay free
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if has_token_types(model, result.tokenizer):
        inputs["token_type_ids"] = torch.zeros_like(ids_BT)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that are not needed here
    with warnings.catch_warnings(), silence_transformers():
        warnings.simplefilter("ignore")
        # Not optimized: onnxruntime folds constants when it loads.
        program = torch.onnx.export(
            _Graph(model, pools=pools).eval(), (), kwargs=inputs, dynamo=True, optimize=False, verbose=False,
            input_names=list(inputs), output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "tokens"} for name in inputs},
        )  # fmt: skip
        assert program is not None, "with dynamo the exporter returns the program"
        program.save(folder / FILE, external_data=is_large)
    model.config.save_pretrained(folder)
    save_tokenizer(with_pad_token(model, result.tokenizer), folder, located=result.located)
    heads.write_labels(model, folder)
    if model.can_generate():
        save_generation_config(model, folder, stop_ids=result.renderer.stop_ids)
    note = f"its weights are too large for one file of the format, and are in {FILE}.data next to it"
    return [note] if is_large else []


@dataclass(frozen=True)
class OnnxModel(ExportedModel):
    """A session of onnxruntime on the CPU."""

    session: Any

    @property
    def has_types(self) -> bool:
        return any(node.name == "token_type_ids" for node in self.session.get_inputs())

    def logits(self, batch: Batch) -> Tensor:
        inputs = {"input_ids": batch.ids_BT, "attention_mask": batch.mask_BT, "token_type_ids": batch.types_BT}
        known = {node.name for node in self.session.get_inputs()}
        feeds = {name: tensor.numpy() for name, tensor in inputs.items() if tensor is not None and name in known}
        logits = torch.from_numpy(self.session.run(["logits"], feeds)[0])
        return logits if self.head == "sequence" else logits.flatten(0, 1)[batch.predict_N]


def load_onnx(folder: Path, recipe: Recipe, computing: Computing) -> OnnxModel:
    """The graph in a session of onnxruntime."""
    import onnxruntime

    located = ModelRef("folder", folder, str(folder))
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(folder / FILE, settings, providers=["CPUExecutionProvider"])
    kind = model_kind(located)
    by = f"onnxruntime {version('onnxruntime')}"
    return OnnxModel(load.load_tokenizer(located, None), kind, find_head(recipe.task, located, kind), by, session)


def _card(result: RunResult, folder: Path, options: ExportOptions) -> JsonObject:
    code = (
        "from onnxruntime import InferenceSession\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'session = InferenceSession("{FILE}")\n'
        'tokens = tokenizer(["A text."], return_tensors="np", padding=True, padding_side="right")\n'
        "names = [one.name for one in session.get_inputs()]\n"
        '(logits,) = session.run(["logits"], {name: tokens[name].astype("int64") for name in names})'
    )
    return {"library": "onnx", "relation": "finetune", "use": [("python", code)]}


ONNX = ExportTarget(
    name="onnx",
    doc="A graph for onnxruntime, float32, without a cache.",
    check=_check,
    write=_write,
    load=load_onnx,
    tolerances=lambda result, options: EXACT,
    card=_card,
    reads=(),
    on_card=False,
    check_base=_check_base,
)
