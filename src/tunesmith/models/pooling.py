"""Pooling of token vectors into the vector of a text: as the files of sentence-transformers say, or by their mean.

Source: Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084, section 3.
"""

# B texts, T tokens, D hidden size

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tunesmith.errors import ModelError

PoolingKind = Literal["mean", "cls", "max"]
_KINDS: dict[str, PoolingKind] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max",
}  # fmt: skip
_MODULES, _LIMITS = "modules.json", "sentence_bert_config.json"
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True, slots=True)
class Pooling:
    """The pooling of a model."""

    kind: PoolingKind = "mean"
    normalizes: bool = False
    """Scale a vector to length 1."""
    max_tokens: int | None = None
    """Most tokens of a text, where that is less than the model reads."""


def find_pooling(folder: Path) -> Pooling:
    """The pooling that the files in a model's folder name. Raises ModelError for one that cannot be computed here."""
    if not (folder / _MODULES).is_file():
        return Pooling()
    modules = _json(folder / _MODULES)
    places = [str(module["path"]) for module in modules]
    if outside := [place for place in places if place and (Path(place).name != place or place == "..")]:
        raise ModelError(f"{folder}: {_MODULES}: {outside[0]!r} is no folder in it. Download the model again.")
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
    if strange := [name for name in names if name not in _KNOWN_MODULES]:
        raise ModelError(f"{folder}: {_MODULES}: {strange[0]}: only {', '.join(_KNOWN_MODULES)} can be computed here.")
    kind: PoolingKind = "mean"
    if "Pooling" in names:
        config = _json(folder / places[names.index("Pooling")] / "config.json")
        modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        if len(modes) != 1 or modes[0] not in _KINDS:
            raise ModelError(f"{folder}: {', '.join(modes) or 'no pooling'}: one of {', '.join(_KINDS)} is known.")
        kind = _KINDS[modes[0]]
    limits = folder / _LIMITS
    most = _json(limits).get("max_seq_length") if limits.is_file() else None
    return Pooling(kind, "Normalize" in names, most)


def copy_pooling(source: Path, folder: Path) -> None:
    """Copy the files that say how a text becomes a vector, where `source` has them."""
    if not (source / _MODULES).is_file():
        return
    find_pooling(source)  # which knows what the files name
    places = [module["path"] for module in _json(source / _MODULES) if module["path"]]
    configs = [f"{place}/config.json" for place in places]
    for name in (_MODULES, _LIMITS, "config_sentence_transformers.json", *configs):
        if (source / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    for place in places:  # a module without settings is an empty folder
        (folder / place).mkdir(exist_ok=True)


def pool(hidden_BTD: Tensor, mask_BT: Tensor, kind: PoolingKind) -> Tensor:
    """[B, D]: a vector a text; `mask_BT` is 0 at padding."""
    mask_BT1 = mask_BT[..., None].bool()
    if kind == "cls":
        return hidden_BTD[:, 0]
    if kind == "max":
        return hidden_BTD.masked_fill(~mask_BT1, float("-inf")).amax(1)
    return torch.as_tensor(hidden_BTD.masked_fill(~mask_BT1, 0.0).sum(1) / mask_BT1.sum(1))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}. Download the model again.") from error
