"""Weights written to safetensors one tensor at a time: memory holds the largest one, never a copy of the model.

Source of the format: the safetensors README (8 bytes of length, a JSON header, the tensors end to end).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from tunesmith.models.folder import INDEX, SINGLE
from tunesmith.models.modes import silence_transformers

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def stored_names(model: PreTrainedModel) -> dict[str, str] | None:
    """Name in the files of each weight of a model; tied ones once. None: files hold other tensors than the
    model (as of experts in one), or other than floats, so that all have to be in memory to be written."""
    state = {name: weight for name, weight in model.state_dict().items()}  # noqa: C416 — it is emptied below
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    if not all(weight.is_floating_point() for weight in state.values()):
        return None
    state = remove_tied_weights_from_state_dict(state, model)
    names = {id(weight): name for name, weight in state.items()}
    with silence_transformers():
        files = revert_weight_conversion(model, dict(state))
    if {id(weight) for weight in files.values()} != set(names):
        return None
    return {names[id(weight)]: name for name, weight in files.items()}


def write_streamed(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    names: Mapping[str, str],
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    shard_bytes: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `tensors`, rounded to `dtype`, as they come, into files of at most `shard_bytes` and one tensor.

    `names` are those in the files; `shapes` are in the order in which tensors come. Others are left out.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in shapes:
        num_bytes = shapes[name].numel() * dtype.itemsize
        if size + num_bytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    is_single = len(shards) == 1
    files = [
        SINGLE if is_single else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    wanted = ((name, tensor) for name, tensor in tensors if name in names)
    done = 0
    for path, shard in zip(files, shards, strict=True):
        with (folder / path).open("wb") as file:
            _write_header(file, {names[name]: shapes[name] for name in shard}, dtype)
            for expected in shard:
                name, tensor = next(wanted)
                assert name == expected, "tensors come in the order of the header"
                file.write(tensor.detach().cpu().to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data)
                done += 1
                tick(done, len(names))
    if not is_single:
        total = sum(shape.numel() for shape in shapes.values())
        places = {names[name]: path for path, shard in zip(files, shards, strict=True) for name in shard}
        sizes = {"total_parameters": total, "total_size": total * dtype.itemsize}
        index = json.dumps({"metadata": sizes, "weight_map": places}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(index + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
