"""Needs of the images of a run, by formula: passes of the vision tower and its projector, and the vectors kept.

Through a frozen tower an image goes once a run if its vectors find room, else in every pass that shows it. Through
one that learns it goes in every pass, and back.
"""

from __future__ import annotations

import sys
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.data.splits import Splits
from tunesmith.methods.targets import SEEING, is_inside
from tunesmith.models.image_features import MEMORY_SHARE, sees_as_before
from tunesmith.models.modes import layers_of
from tunesmith.models.vision import Measures, Vision, part_modules
from tunesmith.planning.devices import Device
from tunesmith.types import Placeholders

MOST_SIZES = 8
"""Sizes of images that are prepared to be measured, from the smallest to the largest."""
LOOKED_AT = 256
"""Images whose sizes are looked at, evenly taken."""
PREPARED, READ = 15e-9, 8e-4
"""Seconds to decode, resize and normalize a number of an image's pixels with Pillow, on a core, and to find and open
the image."""
OPERATIONS_STARTED = 15
"""Operations that a layer starts in a pass without gradient."""
THERE_AND_BACK = 3
"""Times the work of a pass that it takes with its way back."""
AT_WORK = 0.7
"""Share of the inputs and outputs of a layer that a pass without gradient holds."""


@dataclass(frozen=True, slots=True)
class Shown:
    """The images of a run's rows."""

    different: int
    trained: float
    """Images that a training row shows, on average."""
    held: int
    """Images that all held-out rows show."""
    mean: Measures
    largest: Measures

    @classmethod
    def of(cls, rows: Splits, placeholders: Placeholders | None) -> Shown | None:
        """None: no row has an image."""
        if not rows.has_images:
            return None
        assert isinstance(placeholders, Vision), "rows with images were encoded for a model that sees"
        sides = [
            [number for i in rows_I for number in store.images_at(int(i))] if store.images is not None else []
            for store, rows_I in rows.sides
        ]
        stores = {number: store for (store, _), numbers in zip(rows.sides, sides, strict=True) for number in numbers}
        looked_at = sorted(stores)[:: max(1, len(stores) // LOOKED_AT)]
        images = [stores[number].images[number] for number in looked_at]  # type: ignore[index]
        sizes = sorted(((image.width, image.height) for image in images), key=lambda size: size[0] * size[1])
        places = np.unique(np.linspace(0, len(sizes) - 1, MOST_SIZES).round().astype(int))
        measured = [placeholders.measure(*sizes[place]) for place in places]
        mean = [round(float(np.mean(values))) for values in zip(*map(astuple, measured), strict=True)]
        largest = max(measured, key=lambda each: each.numbers)
        return cls(len(stores), len(sides[0]) / len(rows.train_rows), len(sides[1]), Measures(*mean), largest)


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision tower and its projector, in numbers."""

    weights: int
    """Weights of the tower, by which a patch is multiplied."""
    projector: int
    """Weights of the projector, by which a vector is multiplied."""
    features: int
    """Inputs and outputs of the tower's linear layers, for one patch."""
    layers: int
    hidden: int
    """Numbers of a patch between layers."""
    per_patch: int
    """Numbers of pixels that make a patch."""
    vector: int
    """Bytes that are kept of a token: a model that reads inner layers too keeps theirs."""
    learns: bool
    """Whether something of tower or projector is trained."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Tower | None:
        """The tower of a model with its method attached. None: it reads text alone."""
        parts, config = part_modules(model), model.config
        if not parts:
            return None
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]
        tower, projector = ([p for name, p in matrices if is_inside(name, parts[word])] for word in SEEING)
        reads_pixels = next((p for p in tower if p.ndim > 3), tower[0])  # a convolution, or what is written as product
        levels = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ())
        layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
        return cls(
            weights=sum(p.numel() for p in tower),
            projector=sum(p.numel() for p in projector),
            features=sum(p.shape[0] + p[0].numel() for p in tower),
            layers=max(1, layers - len(layers_of(model))),
            hidden=int(config.vision_config.hidden_size),
            per_patch=reads_pixels[0].numel(),
            vector=levels * int(config.get_text_config().hidden_size) * model.dtype.itemsize,
            learns=not sees_as_before(model),
        )

    def patches(self, image: Measures) -> int:
        return image.numbers // self.per_patch

    def seconds(self, image: Measures, device: Device) -> float:
        """Seconds of a pass of one image, prepared before it. Source of the products: see `forecast.pass_seconds`."""
        patches = self.patches(image)
        products = 2 * self.weights * patches + 2 * self.projector * image.tokens
        attention = 4 * self.layers * self.hidden * patches * patches / image.tiles
        seconds = device.seconds(products, attention)
        launches = self.layers * OPERATIONS_STARTED * device.launch
        both = seconds + launches if device.kind == "cpu" else max(seconds, launches)  # see `forecast.step_seconds`
        return both + PREPARED * image.numbers + READ

    def needed(self, shown: Shown) -> int:
        """Bytes of the vectors of all images."""
        return shown.different * shown.mean.tokens * self.vector

    def kept(self, shown: Shown, room: int) -> int:
        """Bytes of vectors that are kept."""
        return 0 if self.learns else min(int(MEMORY_SHARE * room), self.needed(shown))

    def passes(self, shown: Shown, room: int, views: float) -> float:
        """Passes of a frozen tower in a run that shows `views` images, the same ones again too."""
        share = self.kept(shown, room) / max(1, self.needed(shown))
        return share * min(shown.different, views) + (1 - share) * views

    def add_passes(
        self, shown: Shown, device: Device, counts: dict[Any, float], prices: dict[Any, float], *,
        in_step: float, evaluations: int, held_tokens: int,
    ) -> None:  # fmt: skip
        """Add the passes to the work of a run, by kind: a frozen tower is work of its own, one that learns is part of
        each step and of what is measured. `in_step`: images of a mean step."""
        seconds = self.seconds(shown.mean, device)
        if self.learns:
            # An image is prepared once, whatever the way back, and the images of a step go together.
            prepared = PREPARED * shown.mean.numbers + READ
            launches = (1 - in_step) * self.layers * OPERATIONS_STARTED * device.launch * (device.kind == "cpu")
            prices["training"] += THERE_AND_BACK * (in_step * (seconds - prepared) + launches) + in_step * prepared
            prices["measuring"] += shown.held * seconds / max(1, held_tokens)
            return
        views = in_step * counts["training"] + shown.held * evaluations
        counts["seeing"], prices["seeing"] = self.passes(shown, room_for_images(device), views), seconds

    def memory(self, shown: Shown, room: int, *, images: int, itemsize: int, kept: float) -> ImageBytes:
        """`images`: of the heaviest pass; `kept`: times that a layer keeps its inputs and outputs for the way back."""
        layer = itemsize * self.features / self.layers
        at_work = (4 + itemsize) * shown.largest.numbers + AT_WORK * layer * self.patches(shown.largest)
        activations = images * self.patches(shown.mean) * kept * layer * self.layers if self.learns else 0
        return ImageBytes(self.kept(shown, room), int(at_work), int(activations))


def room_for_images(device: Device) -> int:
    """Bytes of which vectors of images fill a part. Beside a card there is more than they need."""
    return device.room if device.kind == "cpu" else sys.maxsize


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """Memory for images."""

    kept: int = 0
    """Bytes of vectors."""
    at_work: int = 0
    """Bytes of a pass of one image without gradient: its pixels, and a layer."""
    activations: int = 0
    """Bytes that a tower that learns keeps of a pass of the model."""
