"""A model's folder as Hugging Face writes it: what it must hold, and what is refused.

Weights are read from safetensors alone; code that comes with a model is never run. The headers of weight files
are checked against the files before anything maps memory by their word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from tunesmith.errors import ModelError
from tunesmith.types import Record

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
"""Endings of weight files that can run code or need another framework."""
MAX_JSON_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its shape in torch's order, and how it is stored."""

    shape: tuple[int, ...]
    dtype: str


class DamagedError(Exception):
    """Why a header cannot be right; the caller knows the file."""


def check_folder(folder: Path, name: str) -> None:
    """Raise ModelError unless `folder` holds a model in plain safetensors that needs no code of its own."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: no config.json.{_instead(folder, name)}")
    config = read_json(folder / "config.json")
    check_code(folder)
    if config.get("quantization_config"):
        kind = _as_object(config["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"{folder / 'config.json'}: its weights are quantized ({kind}), and tuning needs them as they "
            "were. Use the model it was made from, or a GGUF file."
        )
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{name}: a model and an adapter (adapter_config.json) in one folder: it is not clear which is "
            "meant. Move the adapter into a folder of its own."
        )
    read_tensors(folder, name)


def check_code(folder: Path) -> None:
    """Raise ModelError if the model comes with code of its own."""
    for file in ("config.json", "tokenizer_config.json"):
        if (folder / file).is_file() and read_json(folder / file).get("auto_map"):
            raise ModelError(
                f"{folder / file}: auto_map: this model brings its own code, which is never run. Use a model "
                "whose architecture is part of transformers; if this one is, take auto_map out of a copy of "
                "the folder."
            )


def _instead(folder: Path, name: str) -> str:
    if (folder / "recipe.yaml").is_file():
        return " This is a run; only one that tuned all weights and is done can be tuned again (its model folder)."
    if (folder / "adapter_config.json").is_file():
        return " This is an adapter. Give the model that it was made for."
    near = sorted(path.parent.name for path in folder.glob("*/config.json"))
    return (
        f" Did you mean {Path(name) / near[0]}?" if near else " Give the folder of a model as Hugging Face writes it."
    )


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a model, in order. Raises ModelError if there are none or some are missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        files = [folder / file for file in shards(folder / INDEX)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ModelError(f"{name}: {INDEX} names {missing[0]}, which is not there. Download or copy it again.")
        return files
    names = sorted(path.name for path in folder.iterdir())
    if pickles := [file for file in names if file.endswith(PICKLES)]:
        raise ModelError(refuse_pickles(folder, name, pickles))
    if others := [file for file in names if file.endswith(".safetensors")]:
        raise ModelError(
            f"{name}: no {SINGLE} and no {INDEX}, only {', '.join(others[:3])}. Rename it, or add an index."
        )
    raise ModelError(f"{name}: no weights: no {SINGLE}. Give the folder of a whole model.")


def refuse_pickles(folder: Path, name: str, files: list[str]) -> str:
    return (
        f"{name}: its weights are in {', '.join(files[:3])}, a format that can run code when it is read: refused. "
        'If you trust it, convert it and copy its tokenizer files into the folder: python -c "from transformers import '
        f"{_class_name(folder)} as M; M.from_pretrained('{name}').save_pretrained('converted')\""
    )


def _class_name(folder: Path) -> str:
    """The class that the config names, with the head that its weights have."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    named = config.get("architectures")
    first = str(named[0]) if isinstance(named, list) and named else ""
    return first if re.fullmatch(r"[A-Z]\w{0,79}", first, re.ASCII) else "AutoModelForCausalLM"


def shards(index: Path) -> list[str]:
    """The files that a safetensors index names, each a plain name in its folder."""
    files = sorted({str(file) for file in _as_object(read_json(index).get("weight_map")).values()})
    if not files:
        raise ModelError(f"{index}: no weight_map. Download or copy it again.")
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file) or file.startswith("."):
            raise ModelError(f"{index}: {file!r}: a shard must be a .safetensors file in the index's folder.")
    return files


def read_tensors(folder: Path, name: str) -> dict[str, TensorInfo]:
    """Every tensor of a model's folder, from the headers of its files, each checked against its file."""
    tensors: dict[str, TensorInfo] = {}
    for file in weight_files(folder, name):
        tensors |= read_safetensors(file)
    return tensors


def read_json(path: Path) -> Record:
    """A JSON object from a file of a model. Raises ModelError, naming it, where it is none."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ModelError(f"{path}: {path.stat().st_size:,} bytes: more than the {MAX_JSON_BYTES:,} allowed for JSON.")
    try:
        value = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ModelError(f"{path}: not JSON ({error}). Download or copy it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON {type(value).__name__}, where an object is due.")
    return value


def _as_object(value: Any) -> Record:
    return value if isinstance(value, dict) else {}


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, from its header, which the library checks against the file.

    Raises ModelError, naming the file, where sizes or offsets do not fit each other and the file byte for byte.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 — the file is not a mapping
            return {name: TensorInfo(tuple(stored.get_shape()), stored.get_dtype()) for name, stored in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: a damaged safetensors file: {error}. Download or copy it again.") from error
