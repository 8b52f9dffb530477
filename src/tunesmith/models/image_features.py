"""Arguments by which a model reads the images of a batch: their vectors, their places, and positions.

Images go through the vision tower before the pass of the text, whose forward takes their vectors as
`mm_encoder_outputs`. Through a frozen tower each image goes alone. Its vectors then depend on image and tower
only, not on the row, so they are computed once and kept, with the same bits.
"""

# B rows, T tokens, M kinds of positions

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tunesmith.models.attention import apart
from tunesmith.models.machine import free_on_processor
from tunesmith.models.modes import eval_mode, text_part
from tunesmith.types import BatchImage, JsonObject

MEMORY_SHARE = 0.25
"""Share of the memory, free when the first image is computed, that kept vectors may fill."""
TYPE_NAMES = ("mm_token_type_ids", "token_type_ids")
"""Arguments of a forward for the kind of each token, 1 for an image's. Without them Gemma 3 silently reads
images in one direction."""

ImageKey = tuple[int, bool]
"""See `BatchImage.key`."""


@dataclass
class KeptVectors:
    """Vectors of images that went through a frozen tower, by the images' numbers."""

    room: int = field(default_factory=lambda: int(MEMORY_SHARE * free_on_processor()))
    """Bytes that are left."""
    computed: int = 0
    """Images that went through the tower."""
    seconds: float = 0.0
    """Seconds that these images took, with their preparation, if the tower is frozen."""
    entries: dict[ImageKey, _Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class _Seen:
    """One image as a model sees it."""

    levels: tuple[tuple[Tensor, ...], ...]
    """The tower's vectors in the pieces that the model makes, [n, D] or more of them in one tensor; behind them
    vectors of inner layers, for models that read these too (Qwen3-VL)."""
    output: type
    """The model's own class for the output of its tower."""
    is_list: bool
    """Whether the output holds a list, a piece for each image, instead of one tensor."""
    grid: Tensor | None
    """[1, 3], patches in time, height and width, for models that count positions by them."""

    def mapped(self, change: Callable[[Tensor], Tensor]) -> _Seen:
        """Change every vector."""
        return replace(self, levels=tuple(tuple(map(change, pieces)) for pieces in self.levels))

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for pieces in self.levels for piece in pieces)


_KEPT: WeakKeyDictionary[nn.Module, KeptVectors] = WeakKeyDictionary()


def kept_vectors(model: nn.Module) -> KeptVectors:
    """The vectors that are kept for a model."""
    if model not in _KEPT:
        _KEPT[model] = KeptVectors()
    return _KEPT[model]


def image_inputs(
    model: nn.Module,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    images: Sequence[BatchImage],
    *,
    lengths: Sequence[int] = (),
) -> JsonObject:
    """Arguments of the model's forward for rows of which at least one has an image; `mask_BT` of padded rows,
    `lengths` of packed ones, of which what fills a pass is one too.

    `images`: of all rows, in the order of their tokens.
    """
    body: Any = model.base_model
    seen = _look(model, images)
    accepted = _arguments(type(body).forward)
    is_image_BT = (ids_BT == model.config.image_token_id).long()  # type: ignore[union-attr]
    inputs: dict[str, Any] = {"mm_encoder_outputs": {"image": _joined(seen)}}
    inputs |= {name: is_image_BT for name in TYPE_NAMES if name in accepted}
    if hasattr(body, "get_rope_index"):
        # Always given: what the model would take else is the state of its call before.
        grids = torch.cat([each.grid for each in seen if each.grid is not None]).to(ids_BT.device)
        inputs["position_ids"] = (
            _packed_positions(body, ids_BT, is_image_BT, grids, lengths)
            if lengths
            else body.get_rope_index(ids_BT, is_image_BT, image_grid_thw=grids, attention_mask=mask_BT)[0]
        )
    return inputs


def _packed_positions(body: Any, ids_1T: Tensor, is_image_1T: Tensor, grids: Tensor, lengths: Sequence[int]) -> Tensor:
    """[M, 1, T]: the positions of each row alone, laid end to end."""
    sizes = torch.tensor(lengths, device=ids_1T.device)
    ids_BT, is_image_BT = (
        pad_sequence(list(torch.split(flat_1T[0], list(lengths))), batch_first=True)
        for flat_1T in (ids_1T, is_image_1T)
    )
    mask_BT = (torch.arange(ids_BT.shape[1], device=ids_1T.device) < sizes[:, None]).long()
    positions_MBT, _ = body.get_rope_index(ids_BT, is_image_BT, image_grid_thw=grids, attention_mask=mask_BT)
    positions_MT: Tensor = positions_MBT[:, mask_BT.bool()]
    return positions_MT[:, None]


def _joined(seen: Sequence[_Seen]) -> Any:
    """Join the outputs of single images into one output, in the form in which the model makes it."""
    first = seen[0]
    vectors, *inner = ([piece for each in seen for piece in each.levels[i]] for i in range(len(first.levels)))
    levels = {"deepstack_features": inner} if inner else {}
    return first.output(pooler_output=vectors if first.is_list else torch.cat(vectors), **levels)


def _look(model: nn.Module, images: Sequence[BatchImage]) -> list[_Seen]:
    """The vectors of each image, from the tower or kept; an image that occurs twice is computed once."""
    frozen, memory = sees_as_before(model), kept_vectors(model)
    of_pass: dict[ImageKey, _Seen] = {}
    if frozen:
        entries = {image.key: memory.entries[image.key] for image in images if image.key in memory.entries}
        of_pass = {key: seen.mapped(partial(_cast, model)) for key, seen in entries.items()}
    missing = {image.key: image for image in images if image.key not in of_pass}
    memory.computed += len(missing)
    if not frozen:
        read = {key: _read(model, image) for key, image in missing.items()}
        of_pass |= zip(read, _together(model, list(read.values())), strict=True)
        return [of_pass[image.key] for image in images]
    began = time.perf_counter()
    for key, image in missing.items():
        with eval_mode(model):  # neither gradient nor dropout
            of_pass[key] = seen = _alone(model, _read(model, image))
        if seen.nbytes <= memory.room:
            memory.entries[key] = seen.mapped(lambda tensor: tensor.cpu())
            memory.room -= seen.nbytes
    memory.seconds += time.perf_counter() - began
    return [of_pass[image.key] for image in images]


def _read(model: nn.Module, image: BatchImage) -> dict[str, Tensor]:
    """The processor's tensors that the model's tower takes, on the model's device, pixels in its type."""
    accepted = _arguments(type(model.base_model).get_image_features)  # type: ignore[union-attr]
    return {name: _cast(model, tensor) for name, tensor in image.pixels().items() if name in accepted}


def _together(model: nn.Module, images: Sequence[Mapping[str, Tensor]]) -> list[_Seen]:
    """Images through a tower that learns: in one call if all have one shape and no further arguments."""
    shapes = {tuple(each["pixel_values"].shape) for each in images}
    if len(images) < 2 or len(shapes) > 1 or any(each.keys() != {"pixel_values"} for each in images):
        return [_alone(model, each) for each in images]
    num = len(images)
    seen = _alone(model, {"pixel_values": torch.cat([each["pixel_values"] for each in images])})
    (vectors,) = seen.levels  # inner layers come with a grid
    pieces = vectors if seen.is_list else vectors[0].chunk(num)
    size = len(pieces) // num
    return [replace(seen, levels=(tuple(pieces[i * size : (i + 1) * size]),)) for i in range(num)]


def _alone(model: nn.Module, arguments: Mapping[str, Tensor]) -> _Seen:
    """One image through tower and projector."""
    body: Any = model.base_model
    with apart():
        output = body.get_image_features(**arguments, return_dict=True)
    vectors = output.pooler_output
    is_list = not isinstance(vectors, Tensor)
    inner = tuple(tuple(level) for level in getattr(output, "deepstack_features", None) or ())
    levels = tuple(vectors) if is_list else (vectors,), *inner
    return _Seen(levels, type(output), is_list, arguments.get("image_grid_thw"))


def _cast(model: nn.Module, tensor: Tensor) -> Tensor:
    """On the model's device, numbers of pixels in its type."""
    tensor = tensor.to(model.device)  # type: ignore[arg-type]
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor  # type: ignore[arg-type]


def sees_as_before(model: nn.Module) -> bool:
    """Whether nothing outside of the language model, the output layer aside, is trained or has an adapter."""
    body: Any = model.base_model
    language = {id(module) for module in text_part(model).modules()}
    return not any(
        type(module).__module__.startswith("tunesmith.methods")
        or any(p.requires_grad for p in module.parameters(False))
        for module in body.modules()
        if id(module) not in language
    )


@cache
def _arguments(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
