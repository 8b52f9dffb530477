"""The processor of a model that sees: the text in the place of an image, and its pixels.

The processor is built from its parts, with Pillow as the only resizer: where torchvision is installed,
transformers resizes differently, so two servers would answer differently. Videos are never read, and packages
that only they need are not needed here.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from tunesmith.errors import ModelError, is_out_of_memory
from tunesmith.models.folder import read_json
from tunesmith.models.modes import silence_transformers, text_part

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FAMILIES = (
    "llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "gemma3", "gemma4", "qwen2_5_vl", "qwen3_vl",
    "qwen3_5", "internvl", "mistral3",
)  # fmt: skip
"""Types of models whose images are read here, each held by a test against its own forward."""
_PROCESSORS = {
    "LlavaProcessor": "llava",
    "LlavaNextProcessor": "llava_next",
    "LlavaOnevisionProcessor": "llava_onevision",
    "Idefics3Processor": "idefics3",
    "SmolVLMProcessor": "smolvlm",
    "Gemma3Processor": "gemma3",
    "Gemma4Processor": "gemma4",
    "Qwen2_5_VLProcessor": "qwen2_5_vl",
    "Qwen3VLProcessor": "qwen3_vl",
    "InternVLProcessor": "internvl",
    "PixtralProcessor": "pixtral",
}
"""Class of a processor → the part of transformers that has it."""
_COUNTS_OF_ROWS = "batch_num_images"
"""Key that a processor returns if it prepares the only image of a row differently from one of several."""
MOST_EXPANDED = 500
"""Sizes of images whose texts are remembered: photos have many, and a text can be a hundred kilobytes."""
_REFUSALS = (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError)
"""Errors of a processor for a shape that it does not take."""


def vision_of(tokenizer: Any) -> Vision | None:
    """The `Vision` of the tokenizer's model, from the processor's files next to the tokenizer's. None: the
    model reads text alone, or its family is not one of `FAMILIES`."""
    folder = Path(tokenizer.name_or_path)
    name = processor_class(folder)
    return Vision(folder, name) if name in _PROCESSORS else None


def processor_class(folder: Path) -> str:
    """The class of the processor in a model's folder; "": it has none."""
    names = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return ""
    named = [read_json(folder / name).get("processor_class") for name in names if (folder / name).is_file()]
    return next((str(name) for name in named if name), "")


@dataclass(frozen=True, slots=True)
class Measures:
    """An image as its model reads it."""

    numbers: int
    """Numbers of its prepared pixels."""
    tiles: int
    """Parts of it that see nothing of each other in the tower."""
    tokens: int
    """Vectors that it fills in a row."""


@dataclass(eq=False)
class Vision:
    """A `types.Placeholders`, and the pixels of images. It is sent to other processes as its folder."""

    folder: Path
    name: str
    """Class of the processor."""
    _expanded: dict[tuple[int, int, bool], str] = field(default_factory=dict, repr=False)

    def __reduce__(self) -> Any:
        return Vision, (self.folder, self.name)

    @cached_property
    def _processor(self) -> Any:
        """Raises ModelError where it cannot be built."""
        try:
            with silence_transformers():
                return _build(self.folder, self.name)
        except (ImportError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            what = " ".join(str(error).split())[:300]
            raise ModelError(f"{self.folder}: its image processor cannot be built: {what}") from error

    @property
    def token(self) -> str:
        """The word that a chat template writes for an image."""
        return str(self._processor.image_token)

    @property
    def token_id(self) -> int:
        """The token that takes a vector of an image."""
        return int(self._processor.image_token_ids[0])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the processor's settings and the versions of what computes with them."""
        files = {name: read_json(self.folder / name) for name in PROCESSOR_FILES if (self.folder / name).is_file()}
        made_by = {package: version(package) for package in ("pillow", "transformers")}
        return hashlib.sha256(json.dumps([files, made_by], sort_keys=True).encode()).hexdigest()

    @cached_property
    def sees_several(self) -> bool:
        """Whether an image is prepared differently if its row has several. LLaVA-OneVision cuts only a single
        image into tiles."""
        return _COUNTS_OF_ROWS in self._processor.image_processor.model_input_names

    def expand(self, width: int, height: int, *, several: bool = False) -> str:
        """The text that takes the place of an image of this size: the processor's own, for a blank one.

        Raises ValueError for a shape that the processor does not take.
        """
        key = width, height, several and self.sees_several
        if key not in self._expanded:
            if len(self._expanded) == MOST_EXPANDED:
                self._expanded.clear()
            _, self._expanded[key] = self._prepared(_blank(width, height), several=key[2])
        return self._expanded[key]

    def pixels(self, picture: Image, *, several: bool = False) -> Mapping[str, Tensor]:
        """The image as the model reads it, alone: arguments of its `get_image_features`, and counts besides.

        Raises ValueError as `expand`.
        """
        made, _ = self._prepared(picture, several=several and self.sees_several, return_tensors="pt")
        return {key: value for key, value in made.items() if isinstance(value, Tensor)}

    def _prepared(self, picture: Image, *, several: bool, **options: Any) -> tuple[Mapping[str, Any], str]:
        """The processor's output for an image, and the text in the image's place.

        Where it prepares one of several images differently (`sees_several`), a blank image is added and left
        out of the output. Raises ValueError for a shape that the processor does not take.
        """
        row = [picture, _blank(1, 1)] if several else [picture]
        try:
            with silence_transformers():
                made, texts = self._processor._process_images(
                    [row] if self.sees_several else row, **{**self._options, **options}
                )
        except _REFUSALS as error:
            if is_out_of_memory(error):
                raise
            why = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            size = f"{picture.width} × {picture.height} pixels"
            raise ValueError(f"the model's processor refuses {size}: {why}.") from error
        if several:
            made = {key: value if key == _COUNTS_OF_ROWS else value[:1] for key, value in made.items()}
        return made, texts[0]

    def measure(self, width: int, height: int) -> Measures:
        """Measure an image of this size, alone in its row. Raises ValueError for one that is not read."""
        text = self.expand(width, height)
        pixels = self.pixels(_blank(width, height))["pixel_values"]
        tiles = prod(pixels.shape[:-3]) if pixels.ndim > 3 else 1
        word = self._processor.tokenizer.convert_ids_to_tokens(self.token_id)
        return Measures(numbers=pixels.numel(), tiles=tiles, tokens=text.count(word))

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Keywords of the image processor: some have their defaults in the processor around it."""
        processor = self._processor
        merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
        options: dict[str, Any] = merged["images_kwargs"]
        return options


def _build(folder: Path, name: str) -> Any:
    """Build a processor from its parts, without a reader of videos, which would need torchvision.

    Raises ImportError for a release of transformers that builds processors in another way.
    """
    module = _module(f"transformers.models.{_PROCESSORS[name]}", _PROCESSORS[name])
    plain: Any = getattr(module, name)
    if not hasattr(plain, "replace_image_token"):
        raise ImportError("images need transformers 5.24 or a newer one")
    if hasattr(module, "num2words") and module.num2words is None:
        module.num2words = str  # SmolVLM's, which writes the number of a video's frames with it
    without_checks: Any = type(name, (plain,), {"check_argument_for_proper_class": lambda self, name, argument: None})
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    settings, _ = plain.get_processor_dict(folder, local_files_only=True)
    parts = {"image_processor": images, "tokenizer": tokenizer, "video_processor": None}
    args = [parts.get(attribute) for attribute in plain.get_attributes()]  # nothing here hears
    return without_checks.from_args_and_dict(args, settings)


def _module(package: str, name: str) -> Any:
    """The module of a processor. Pixtral's takes the size of an image from the resizer for torchvision as it is
    read: where that cannot be imported, the resizer for Pillow, which computes the same, takes its place
    meanwhile.
    """
    try:
        return import_module(f"{package}.processing_{name}")
    except ModuleNotFoundError as missing:
        if missing.name != "torchvision":
            raise
    resizer = f"{package}.image_processing_{name}"
    sys.modules[resizer] = import_module(f"{package}.image_processing_pil_{name}")
    try:
        return import_module(f"{package}.processing_{name}")
    finally:
        del sys.modules[resizer]


def _blank(width: int, height: int) -> Image:
    from PIL import Image as pillow

    return pillow.new("RGB", (width, height))


def is_seeing(config: Any) -> bool:
    """Whether a config is of a model whose images are read here."""
    return getattr(config, "model_type", None) in FAMILIES


_TOWERS = ("vision_tower", "vision_model", "visual")
_MERGER = "merger"
"""Qwen's projectors, modules inside its tower: one, and in Qwen3-VL more for the vectors of inner layers."""
_HEARING = "audio"


def part_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names of modules and single weights of a model that sees, by the words for its parts: language,
    projector, vision. Empty for others.

    The projector is what lies between the tower and the language model, or the mergers inside a tower. What a
    model hears with (Gemma 4) is in no part: it stays as it is.
    """
    if not is_seeing(getattr(model, "config", None)):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    body: Any = model.base_model
    language, output = text_part(model), model.get_output_embeddings()  # type: ignore[operator]
    single = [f"{names[id(body)]}.{name}" for name, _ in body.named_parameters(recurse=False)]
    parts = {"language": [names[id(language)], names[id(output)]], "projector": single, "vision": []}
    for name, module in body.named_children():
        if module is language or _HEARING in name:
            continue
        inner = dict(module.named_children()) if name in _TOWERS else {}
        if mergers := [key for key in inner if _MERGER in key]:
            parts["projector"] += [names[id(inner[key])] for key in mergers]
            parts["vision"] += [names[id(child)] for key, child in inner.items() if key not in mergers]
        else:
            parts["vision" if name in _TOWERS else "projector"].append(names[id(module)])
    return parts


def processor_template(folder: Path) -> str | None:
    """The chat template in the file that processors of earlier versions of transformers wrote, which the
    tokenizer does not read."""
    file = folder / "chat_template.json"
    if not processor_class(folder) or not file.is_file() or (folder / "chat_template.jinja").is_file():
        return None
    template = read_json(file).get("chat_template")
    return template if isinstance(template, str) else None
