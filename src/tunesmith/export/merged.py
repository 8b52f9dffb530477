"""`merged`: a plain model folder, base plus delta, that `AutoModel….from_pretrained` loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tunesmith.export.options import EXACT, ROUNDED, Bounds, Export, Options
from tunesmith.export.source import Source
from tunesmith.models.pooling import copy_pooling
from tunesmith.models.save import save_model
from tunesmith.models.size import model_size

_CLASSES = {"next_token": "CausalLM", "masked_token": "MaskedLM", "sequence": "SequenceClassification",
            "tokens": "TokenClassification"}  # fmt: skip


def out_dtype(source: Source, options: Options) -> torch.dtype:
    """What the weights are cast to, once."""
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    return torch.bfloat16 if source.weights.is_gguf else source.stored_dtype


def auto_class(source: Source) -> str:
    """The class of transformers that loads the model."""
    is_pair = source.head == "next_token" and source.kind == "encoder_decoder"
    return f"AutoModelFor{'Seq2SeqLM' if is_pair else _CLASSES[source.head]}"


def _check(source: Source, options: Options) -> list[str]:
    notes = []
    if source.weights.is_gguf and options.dtype == "auto":
        notes.append("the base is a GGUF: the merge is written in bfloat16, never back into its blocks")
    dtype = out_dtype(source, options)
    if dtype not in (torch.float32, source.stored_dtype):
        notes.append(f"weights are rounded from {_name(source.stored_dtype)} to {_name(dtype)}, once")
    return notes


def _write(source: Source, folder: Path, options: Options) -> list[str]:
    dtype = out_dtype(source, options)
    # In float32 unless nothing would be gained: `merge` adds in float32 and rounds to what the weight has.
    model, attachment = source.load(dtype if dtype == source.stored_dtype else torch.float32)
    if attachment is not None:
        attachment.merge()
    model.to(dtype)
    save_model(model, source.tokenizer, folder, located=source.result_located, stop_ids=source.renderer.stop_ids)
    if source.head == "masked_token":
        copy_pooling(source.weights.path, folder)
    return []


def _num_bytes(source: Source, options: Options) -> int:
    return model_size(source.weights).num_params * out_dtype(source, options).itemsize


def _bounds(source: Source, options: Options) -> Bounds:
    return EXACT if out_dtype(source, options) == torch.float32 and source.recipe.precision == "float32" else ROUNDED


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    name = auto_class(source)
    code = (
        f"from transformers import AutoTokenizer, {name}\n\n"
        f'model = {name}.from_pretrained("PATH", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")'
    )
    return {"library": "transformers", "relation": "finetune", "use": [("python", code)]}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


MERGED = Export(
    name="merged",
    doc="A model folder of its own: base plus delta, in safetensors.",
    check=_check,
    write=_write,
    num_bytes=_num_bytes,
    bounds=_bounds,
    loader="merged",
    rounds_less=lambda options: "" if options.dtype == "float32" else "--dtype float32",
    card=_card,
    reads=("dtype", "merge_into"),
)
