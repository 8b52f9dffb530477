"""Pooling of token vectors into the vector of a text: as files of sentence-transformers say, or by mean.

Source: Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084, section 3.
"""

# L lines, N pooled tokens, D hidden size

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.types import Batch, JsonObject, Pooling, PoolingKind

_KINDS: dict[str, PoolingKind] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}  # fmt: skip
_MODULES, _LIMITS, _PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def find_pooling(folder: Path) -> Pooling | None:
    """The pooling that the files in a model's folder name, if there are any. Raises ModelError for one that
    cannot be computed here."""
    if not (folder / _MODULES).is_file():
        return None
    modules = _json(folder / _MODULES)
    places = [str(module["path"]) for module in modules]
    if outside := [place for place in places if place and (Path(place).name != place or place == "..")]:
        raise ModelError(f"{folder}: {_MODULES}: {outside[0]!r} is not a folder in it. Download the model again.")
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
    if strange := [name for name in names if name not in _KNOWN_MODULES]:
        raise ModelError(f"{folder}: {_MODULES}: {strange[0]}: only {', '.join(_KNOWN_MODULES)} can be computed here.")
    kind: PoolingKind = "mean"
    config: JsonObject = {}
    if "Pooling" in names:
        config = _json(folder / places[names.index("Pooling")] / "config.json")
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        mode = str(config.get("pooling_mode", "")).removesuffix("token")
        modes = modes or [key for key, kind in _KINDS.items() if kind == mode]
        if len(modes) != 1 or modes[0] not in _KINDS:
            raise ModelError(f"{folder}: {', '.join(modes) or 'no pooling'}: one of {', '.join(_KINDS)} is known.")
        kind = _KINDS[modes[0]]
    limits, more = (_json(path) if (path := folder / name).is_file() else {} for name in (_LIMITS, _PROMPTS))
    in_file = more.get("prompts") or {}
    prompts = in_file.get("query") or "", in_file.get("document", in_file.get("passage")) or ""
    include_prompt = bool(config.get("include_prompt", True))
    return Pooling(kind, "Normalize" in names, limits.get("max_seq_length"), *prompts, include_prompt)


def pool(hidden_ND: Tensor, batch: Batch, kind: PoolingKind) -> Tensor:
    """[L, D] float32, the vector of each line of a batch, from the hidden states at its N pooled tokens."""
    line_of_N = batch.row_of_N if batch.line_of_N is None else batch.line_of_N
    hidden_ND, num_lines = hidden_ND.float(), len(batch.lengths)
    if kind == "max":
        lowest_LD = hidden_ND.new_full((num_lines, hidden_ND.shape[1]), float("-inf"))
        return lowest_LD.scatter_reduce(0, line_of_N[:, None].expand_as(hidden_ND), hidden_ND, "amax")
    sums_LD = hidden_ND.new_zeros(num_lines, hidden_ND.shape[1]).index_add(0, line_of_N, hidden_ND)
    return sums_LD / count_each(line_of_N, num_lines)[:, None]


def count_each(index_N: Tensor, num: int) -> Tensor:
    """[num] int64, how often each index occurs. `bincount`, which seeks the largest, would wait for a card."""
    return index_N.new_zeros(num).index_add_(0, index_N, torch.ones_like(index_N))


def write_pooling(pooling: Pooling, folder: Path, *, size: int) -> None:
    """Write the files by which sentence-transformers makes the same vectors, of `size` numbers."""
    names = ["Transformer", "Pooling", *(["Normalize"] if pooling.normalizes else [])]
    places = ["", *(f"{i}_{name}" for i, name in enumerate(names[1:], start=1))]
    modules = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{name}"}
        for i, (name, place) in enumerate(zip(names, places, strict=True))
    ]
    modes = {key: kind == pooling.kind for key, kind in _KINDS.items()}
    prompts = {"query": pooling.query_prompt, "document": pooling.document_prompt}
    settings = {"word_embedding_dimension": size, **modes, "include_prompt": pooling.include_prompt}
    files = {
        _MODULES: modules,
        _LIMITS: {"max_seq_length": pooling.max_tokens, "do_lower_case": False},
        _PROMPTS: {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        f"{places[1]}/config.json": settings,
    }
    for place in places[1:]:  # a module without settings is an empty folder
        (folder / place).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Download the model again.") from error
