"""The arguments by which a model reads the images of a batch: their vectors, where they stand, and positions.

Images go through the vision tower outside of the pass of the text, whose own forward takes their vectors as
`mm_encoder_outputs`. Through a frozen tower each goes alone: its vectors then follow from the image and the
tower, whatever rows it stands in, so they are computed once and kept, with the same bits.
"""

# B rows, T tokens, M kinds of positions

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tunesmith.models.modes import eval_mode, text_part
from tunesmith.types import BatchImage, JsonObject

MEMORY_SHARE = 0.25
"""Most that kept vectors may fill, of the memory that is free when the first image is computed."""
TYPE_NAMES = ("mm_token_type_ids", "token_type_ids")
"""Arguments of a forward for the kind of each token, 1 for an image's: without them Gemma 3 reads images in one
direction, without a word."""


@dataclass
class KeptVectors:
    """Vectors of images that went through a frozen tower, by the images' numbers."""

    room: int = field(default_factory=lambda: int(MEMORY_SHARE * psutil.virtual_memory().available))
    """Bytes that are left."""
    computed: int = 0
    """Images that went through the tower."""
    entries: dict[int, _Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """One image as a model sees it."""

    vectors: Any
    """The tower's output for one image: a list of [n, D], or one tensor."""
    grid: Tensor | None
    """[1, 3], patches in time, height and width, for models that count positions by them."""


_KEPT: WeakKeyDictionary[nn.Module, KeptVectors] = WeakKeyDictionary()


def kept_vectors(model: nn.Module) -> KeptVectors:
    """The vectors that are kept for a model."""
    if model not in _KEPT:
        _KEPT[model] = KeptVectors()
    return _KEPT[model]


def image_inputs(model: nn.Module, ids_BT: Tensor, mask_BT: Tensor | None, images: Sequence[BatchImage]) -> JsonObject:
    """Arguments of the model's forward for rows of which at least one has an image; `mask_BT` of padded rows.

    `images`: of all rows, in the order of their tokens.
    """
    body: Any = model.base_model
    seen = _look(model, images)
    grids = [each.grid for each in seen if each.grid is not None]
    accepted = _arguments(type(body).forward)
    is_image_BT = (ids_BT == model.config.image_token_id).long()  # type: ignore[union-attr]
    inputs: dict[str, Any] = {"mm_encoder_outputs": {"image": _joined([each.vectors for each in seen])}}
    inputs |= {name: is_image_BT for name in TYPE_NAMES if name in accepted}
    if hasattr(body, "get_rope_index"):
        # Always given: what the model would take else is the state of its call before.
        positions_MBT, _ = body.get_rope_index(
            ids_BT, is_image_BT, image_grid_thw=torch.cat(grids).to(ids_BT.device), attention_mask=mask_BT
        )
        inputs["position_ids"] = positions_MBT
    return inputs


def _joined(vectors: Sequence[Any]) -> BaseModelOutputWithPooling:
    """The outputs of single images as the output for all of them, in the form that the model makes."""
    if isinstance(vectors[0], Tensor):
        return BaseModelOutputWithPooling(pooler_output=torch.cat(list(vectors)))
    return BaseModelOutputWithPooling(pooler_output=[piece for pieces in vectors for piece in pieces])


def _look(model: nn.Module, images: Sequence[BatchImage]) -> list[_Seen]:
    """Each image through the tower, or as it was kept; one that is there twice is computed once."""
    frozen, memory = _is_frozen(model), kept_vectors(model)
    of_pass: dict[int, _Seen] = {}
    if frozen:
        of_pass = {i.number: _on(model, memory.entries[i.number]) for i in images if i.number in memory.entries}
    missing = {image.number: image for image in images if image.number not in of_pass}
    memory.computed += len(missing)
    if not frozen:
        pixels = {number: image.pixels() for number, image in missing.items()}
        of_pass |= zip(pixels, _together(model, list(pixels.values())), strict=True)
        return [of_pass[image.number] for image in images]
    for number, image in missing.items():
        with eval_mode(model):  # neither gradient nor dropout
            of_pass[number] = seen = _alone(model, image.pixels())
        size = sum(tensor.nbytes for tensor in _tensors(seen.vectors))
        if size <= memory.room:
            memory.entries[number] = _Seen(_mapped(seen.vectors, lambda tensor: tensor.cpu()), seen.grid)
            memory.room -= size
    return [of_pass[image.number] for image in images]


def _together(model: nn.Module, pixels: Sequence[Mapping[str, Tensor]]) -> list[_Seen]:
    """Images through a tower that learns: in one call where all have one shape and there is no more to them."""
    shapes = {tuple(each["pixel_values"].shape) for each in pixels}
    if len(pixels) < 2 or len(shapes) > 1 or any(each.keys() != {"pixel_values"} for each in pixels):
        return [_alone(model, each) for each in pixels]
    num = len(pixels)
    vectors = _alone(model, {"pixel_values": torch.cat([each["pixel_values"] for each in pixels])}).vectors
    if isinstance(vectors, Tensor):
        return [_Seen(part, None) for part in vectors.chunk(num)]
    size = len(vectors) // num
    return [_Seen(list(vectors[i * size : (i + 1) * size]), None) for i in range(num)]


def _alone(model: nn.Module, pixels: Mapping[str, Tensor]) -> _Seen:
    """One image through tower and projector."""
    body: Any = model.base_model
    accepted = _arguments(type(body).get_image_features)
    arguments = {name: _cast(model, tensor) for name, tensor in pixels.items() if name in accepted}
    return _Seen(body.get_image_features(**arguments, return_dict=True).pooler_output, pixels.get("image_grid_thw"))


def _cast(model: nn.Module, tensor: Tensor) -> Tensor:
    """On the model's device, numbers of pixels in its type."""
    tensor = tensor.to(model.device)  # type: ignore[arg-type]
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor  # type: ignore[arg-type]


def _is_frozen(model: nn.Module) -> bool:
    """Whether nothing outside of the language model, the output layer aside, is trained or has an adapter."""
    body: Any = model.base_model
    language = {id(module) for module in text_part(model).modules()}
    return not any(
        type(module).__module__.startswith("tunesmith.methods")
        or any(p.requires_grad for p in module.parameters(False))
        for module in body.modules()
        if id(module) not in language
    )


def _on(model: nn.Module, seen: _Seen) -> _Seen:
    return _Seen(_mapped(seen.vectors, lambda tensor: tensor.to(model.device)), seen.grid)  # type: ignore[arg-type]


def _tensors(vectors: Any) -> Iterable[Tensor]:
    return [vectors] if isinstance(vectors, Tensor) else vectors


def _mapped(vectors: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(vectors) if isinstance(vectors, Tensor) else [change(tensor) for tensor in vectors]


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
