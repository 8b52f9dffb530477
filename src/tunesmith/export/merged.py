"""`merged`: a plain model folder, base plus delta, for `AutoModel….from_pretrained`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from tunesmith.errors import ModelError
from tunesmith.export.run_result import RunResult, auto_class
from tunesmith.export.target import EXACT, ROUNDED, ExportOptions, ExportTarget, Tolerances, TorchModel, run_dtype
from tunesmith.models.load import model_kind
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import resolve_model
from tunesmith.models.save import save_model
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe


def _dtype(result: RunResult, options: ExportOptions) -> torch.dtype:
    """The dtype that weights are rounded to, once."""
    if options.dtype != "auto":
        chosen: torch.dtype = getattr(torch, options.dtype)
        return chosen
    return torch.bfloat16 if result.weights.is_gguf else result.stored_dtype


def _check(result: RunResult, options: ExportOptions) -> list[str]:
    stored, dtype = result.stored_dtype, _dtype(result, options)
    if dtype in (torch.float32, stored):
        return []
    wanted, whence = (str(one).removeprefix("torch.") for one in (dtype, stored))
    if result.weights.is_gguf:
        return [f"the blocks of the GGUF are unpacked, and rounded to {wanted} once"]
    return [f"weights are rounded from {whence} to {wanted}, once"]


def _write(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    dtype = _dtype(result, options)
    # In float32 unless nothing would be gained: `merge` adds in float32 and rounds to the dtype of the weight.
    model, attachment = result.load(dtype if dtype == result.stored_dtype else torch.float32)
    if attachment is not None:
        attachment.merge()
    model.to(dtype)
    how: dict[str, Any] = {"stop_ids": result.renderer.stop_ids, "pooling": result.renderer.pooling}
    save_model(model, result.tokenizer, folder, located=result.located, **how)
    return []


def _load(folder: Path, recipe: Recipe) -> TorchModel:
    """The model by transformers alone. Raises ModelError for a missing or unknown weight."""
    located = resolve_model(str(folder), offline=True)
    kind = model_kind(located)
    head = find_head(recipe, located, kind)
    with silence_transformers():
        model, found = getattr(transformers, auto_class(head, kind)).from_pretrained(
            folder, dtype=run_dtype(recipe), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    missing = {name for name in found["missing_keys"] if head != "vector" or not name.startswith("pooler.")}
    wrong = sorted({*missing, *found["unexpected_keys"], *map(str, found["mismatched_keys"])})
    if wrong:
        raise ModelError(f"{folder.name}: {len(wrong)} weights do not fit the model, such as {wrong[0]}")
    return TorchModel(tokenizer, kind, head, f"transformers {version('transformers')}", model)


def _tolerances(result: RunResult, options: ExportOptions) -> Tolerances:
    return EXACT if _dtype(result, options) == torch.float32 and result.recipe.precision == "float32" else ROUNDED


def _card(result: RunResult, folder: Path, options: ExportOptions) -> dict[str, Any]:
    name = auto_class(result.head, result.kind)
    code = (
        f"from transformers import AutoTokenizer, {name}\n\n"
        f'model = {name}.from_pretrained("PATH", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")'
    )
    return {"library": "transformers", "relation": "finetune", "use": [("python", code)]}


MERGED = ExportTarget(
    name="merged",
    doc="A model folder of its own: base plus delta, in safetensors.",
    check=_check,
    write=_write,
    load=_load,
    tolerances=_tolerances,
    card=_card,
    reads=("dtype",),
)
