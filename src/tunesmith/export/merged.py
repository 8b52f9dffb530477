"""`merged`: a plain model folder, base plus delta, for `AutoModel….from_pretrained`."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from tunesmith.errors import ModelError
from tunesmith.export.run_result import RunResult, auto_class, tuned_tensors
from tunesmith.export.target import EXACT, ROUNDED, Computing, ExportOptions, ExportTarget, Tolerances, TorchModel
from tunesmith.models.load import load_config, model_kind
from tunesmith.models.modes import silence_transformers
from tunesmith.models.resolve_model import resolve_model
from tunesmith.models.save import Stream, save_model
from tunesmith.models.vision import is_seeing
from tunesmith.planning.defaults import find_head
from tunesmith.recipe.schema import Recipe
from tunesmith.types import JsonObject

_TRIED = ("bfloat16", "float16", "float32")
"""In this order, from the dtype of the base on: each has more bits of a weight than the one before."""


def _dtypes(result: RunResult, options: ExportOptions) -> tuple[str, ...]:
    """The dtype that was named; for auto the base's, bfloat16 for a GGUF, and all finer ones."""
    if options.dtype != "auto":
        return (options.dtype,)
    base = "bfloat16" if result.weights.is_gguf else str(result.stored_dtype).removeprefix("torch.")
    return _TRIED[_TRIED.index(base) :]


def _check(result: RunResult, options: ExportOptions) -> list[str]:
    """Notes of what is known before weights are read."""
    return ["the blocks of the GGUF are unpacked"] if result.weights.is_gguf else []


def _write(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    dtype: torch.dtype = getattr(torch, _dtypes(result, options)[0])
    stored = result.stored_dtype
    # As they are stored, weights stay in their files, and every layer is merged in float32 by itself. What was
    # trained whole would lose by that.
    in_files = dtype == stored or result.is_low_rank
    model, attachment = result.load(stored if in_files else torch.float32)
    tensors = tuned_tensors(model, attachment)
    first = next(tensors)  # takes the adapter off, which leaves the plain model's names
    weights = Stream(chain([first], tensors), dtype, partial(result.on_progress, "write"))
    settings: dict[str, Any] = {"stop_ids": result.renderer.stop_ids, "pooling": result.renderer.pooling}
    save_model(model, result.tokenizer, folder, located=result.located, weights=weights, **settings)
    if dtype in (torch.float32, stored):
        return []
    wanted, whence = (str(each_dtype).removeprefix("torch.") for each_dtype in (dtype, stored))
    return [f"weights are rounded from {whence} to {wanted}, once"]


def _load(folder: Path, recipe: Recipe, computing: Computing) -> TorchModel:
    """The model by transformers alone. Raises ModelError for a missing or unknown weight."""
    located = resolve_model(str(folder), offline=True)
    kind = model_kind(located)
    head = find_head(recipe.task, located, kind)
    with silence_transformers():
        name = auto_class(head, kind, sees=is_seeing(load_config(located)))
        model, loading_info = getattr(transformers, name).from_pretrained(
            folder, dtype=computing.dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    keys = loading_info["missing_keys"]
    missing = {name for name in keys if head != "vector" or not name.startswith("pooler.")}
    wrong = sorted({*missing, *loading_info["unexpected_keys"], *map(str, loading_info["mismatched_keys"])})
    if wrong:
        raise ModelError(f"{folder.name}: {len(wrong)} weights do not fit the model, such as {wrong[0]}")
    by = f"transformers {version('transformers')}"
    return TorchModel(tokenizer, kind, head, by, model.to(computing.device))


def _tolerances(result: RunResult, options: ExportOptions) -> Tolerances:
    return EXACT if _dtypes(result, options)[0] == "float32" else ROUNDED


def _card(result: RunResult, folder: Path, options: ExportOptions) -> JsonObject:
    name = result.auto_class
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
    dtypes=_dtypes,
)
