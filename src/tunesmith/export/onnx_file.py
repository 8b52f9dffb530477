"""`onnx`: a graph that onnxruntime computes on processors, phones and in browsers, with its tokenizer.

Traced by torch's own exporter. The weights keep their names, so that the proof can compare them one by one.
"""

# B rows, T tokens, D hidden size, C classes

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.export.onnx_read import FILE, check_installed
from tunesmith.export.options import EXACT, Export, Options
from tunesmith.export.source import Source
from tunesmith.inference.load import has_token_types
from tunesmith.models import heads
from tunesmith.models.forward import has_cache
from tunesmith.models.heads import pools_last
from tunesmith.models.modes import silence_transformers
from tunesmith.models.save import save_generation_config, save_tokenizer
from tunesmith.models.size import model_size
from tunesmith.models.special_tokens import with_pad_token

KNOWN = (
    "llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral", "phi3", "opt", "gpt_neox", "olmo2",
    "smollm3", "granite", "cohere", "bloom", "falcon", "bert", "roberta", "distilbert", "electra", "deberta-v2",
    "modernbert", "mpnet",
)  # fmt: skip
"""transformers' model types that were shown equal; tests/export/test_onnx.py does so."""
MOST_IN_ONE_FILE = 1_900_000_000
"""A protobuf ends at 2 GiB; from here on weights lie beside the graph."""
DATA = f"{FILE}.data"


class _Graph(nn.Module):
    """What is traced: from tokens to logits, without a cache."""

    def __init__(self, model: PreTrainedModel, *, pools: bool) -> None:
        super().__init__()
        self.model = model
        self._pools = pools
        self._rest = {"use_cache": False} if has_cache(type(model).forward) else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **self._rest}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids
        if not self._pools:
            logits: Tensor = self.model(**given).logits
            return logits
        # The last token is known by the mask: transformers looks for the padding's id, which may also end a text.
        scores_BTC: Tensor = self.model.score(self.model.base_model(**given).last_hidden_state)
        last_B = attention_mask.sum(-1) - 1
        return scores_BTC[torch.arange(scores_BTC.shape[0]), last_B]


def _check(source: Source, options: Options) -> list[str]:
    check_installed()
    if source.kind == "encoder_decoder":
        raise ModelError(
            f"{source.weights.name}: onnx: only encoders and models that go on with a text are written, not an "
            "encoder–decoder. Export merged instead."
        )
    if source.config.model_type not in KNOWN:
        raise ModelError(
            f"{source.weights.name}: onnx: a {source.config.model_type} is not known to compute the same there. Those "
            f"that do: {', '.join(KNOWN)}. Export merged instead."
        )
    return [] if source.kind == "encoder" else ["it has no cache: each new token reads the whole text again"]


def _write(source: Source, folder: Path, options: Options) -> list[str]:
    model, attachment = source.load(torch.float32)
    if attachment is not None:
        attachment.merge()
    has_types = has_token_types(model, source.tokenizer)
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    _save(model, folder / FILE, pools=source.head == "sequence" and pools_last(model), has_types=has_types,
          beside=num_bytes > MOST_IN_ONE_FILE)  # fmt: skip
    model.config.save_pretrained(folder)
    save_tokenizer(with_pad_token(model, source.tokenizer), folder, located=source.result_located)
    heads.write_labels(model, folder)
    if model.can_generate():
        save_generation_config(model, folder, stop_ids=source.renderer.stop_ids)
    return [f"its weights are more than one file of the format holds, and lie beside it in {DATA}"] * (
        num_bytes > MOST_IN_ONE_FILE
    )


def _save(model: PreTrainedModel, path: Path, *, pools: bool, has_types: bool, beside: bool) -> None:
    """Trace on two rows of seven tokens; both numbers stay free. `beside`: weights in a file of their own."""
    ids_BT = torch.arange(14).reshape(2, 7) % model.config.vocab_size
    given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if has_types:
        given["token_type_ids"] = torch.zeros_like(ids_BT)
    with _silent():
        # Not optimized: folded constants lose their names, and onnxruntime folds them when it loads.
        program = torch.onnx.export(
            _Graph(model, pools=pools).eval(), (), kwargs=given, dynamo=True, optimize=False, verbose=False,
            input_names=list(given), output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "tokens"} for name in given},
        )  # fmt: skip
        assert program is not None, "the exporter of today returns what it made"
        program.save(path, external_data=beside)


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter warns of packages that are not needed here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), silence_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    code = (
        "from onnxruntime import InferenceSession\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("PATH")\n'
        f'session = InferenceSession("{FILE}")\n'
        'tokens = tokenizer(["A text."], return_tensors="np", padding=True, padding_side="right")\n'
        "names = [one.name for one in session.get_inputs()]\n"
        '(logits,) = session.run(["logits"], {name: tokens[name].astype("int64") for name in names})'
    )
    return {"library": "onnx", "relation": "finetune", "use": [("python", code)]}


ONNX = Export(
    name="onnx",
    doc="A graph for onnxruntime, float32, without a cache.",
    check=_check,
    write=_write,
    num_bytes=lambda source, options: model_size(source.weights).num_params * 4,
    bounds=lambda source, options: EXACT,
    loader="onnx",
    rounds_less=lambda options: "",
    card=_card,
    reads=("merge_into",),
)
