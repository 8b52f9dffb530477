"""The processor of a model that sees: the text in the place of an image, and its pixels.

The processor is built of its parts, with Pillow as the only resizer: with torchvision installed transformers
resizes otherwise, so that a server with and one without it would answer differently. Videos are never read, and
what only they need is not asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from tunesmith.errors import ModelError
from tunesmith.models.folder import read_json
from tunesmith.models.modes import silence_transformers, text_part

if TYPE_CHECKING:
    from PIL.Image import Image

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
FAMILIES = ("llava", "idefics3", "smolvlm", "gemma3", "qwen2_5_vl")
"""Types of models whose images are read here, each held by a test against its own forward."""
_PROCESSORS = {
    "LlavaProcessor": "llava",
    "Idefics3Processor": "idefics3",
    "SmolVLMProcessor": "smolvlm",
    "Gemma3Processor": "gemma3",
    "Qwen2_5_VLProcessor": "qwen2_5_vl",
}
_KEPT_ARGUMENTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
"""Arguments of `get_image_features` that image processors make; they count crops and rows besides."""
MOST_EXPANDED = 500
"""Sizes of images whose texts are remembered: photos have many, and a text can be a hundred kilobytes."""
_REFUSALS = (ValueError, ArithmeticError, LookupError, TypeError, RuntimeError)
"""Errors of a processor for a shape that it does not take."""


def vision_of(tokenizer: Any) -> Vision | None:
    """The images of the model whose tokenizer it is: its processor's files lie beside the tokenizer's. None: it
    reads text alone, or its family is not one of `FAMILIES`."""
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


@dataclass(eq=False)
class Vision:
    """A `types.Placeholders`, and the pixels of images. It is sent to other processes as its folder."""

    folder: Path
    name: str
    """Class of the processor."""
    _expanded: dict[tuple[int, int], str] = field(default_factory=dict, repr=False)

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

    def expand(self, width: int, height: int) -> str:
        """The text that takes the place of an image of this size: the processor's own, for a blank one.

        Raises ValueError for a shape that the processor does not take.
        """
        size = width, height
        if size not in self._expanded:
            from PIL import Image as pillow

            blank = pillow.new("RGB", size)
            if len(self._expanded) == MOST_EXPANDED:
                self._expanded.clear()
            try:
                with silence_transformers():
                    _, (self._expanded[size],) = self._processor._process_images([blank], **self._options)
            except _REFUSALS as error:
                why = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
                raise ValueError(f"the model's processor refuses {width} × {height} pixels: {why}.") from error
        return self._expanded[size]

    def pixels(self, picture: Image) -> Mapping[str, Tensor]:
        """The image as the model reads it, alone: arguments of its `get_image_features`."""
        with silence_transformers():
            made = self._processor.image_processor([picture], **{**self._options, "return_tensors": "pt"})
        return {key: made[key] for key in _KEPT_ARGUMENTS if key in made}

    @cached_property
    def _options(self) -> dict[str, Any]:
        """Keywords of the image processor: some have their defaults in the processor around it."""
        processor = self._processor
        merged = processor._merge_kwargs(tokenizer_init_kwargs=processor.tokenizer.init_kwargs)
        options: dict[str, Any] = merged["images_kwargs"]
        return options


def _build(folder: Path, name: str) -> Any:
    """The processor of its parts, without a reader of videos: those need
    torchvision, and nothing here reads any.

    Raises ImportError for a release of transformers that builds processors in another way.
    """
    module: Any = import_module(f"transformers.models.{_PROCESSORS[name]}.processing_{_PROCESSORS[name]}")
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
    args = [parts[attribute] for attribute in plain.get_attributes()]
    return without_checks.from_args_and_dict(args, settings)


def is_seeing(config: Any) -> bool:
    """Whether a config is of a model whose images are read here."""
    return getattr(config, "model_type", None) in FAMILIES


_TOWERS = ("vision_tower", "vision_model", "visual")
_MERGER = "merger"
"""Qwen's projector, a module inside its tower."""


def part_modules(model: torch.nn.Module) -> dict[str, list[str]]:
    """Names of modules of a model that sees, by the words for its parts: language,
    projector, vision. Empty for others.

    The projector is what lies beside the tower and the language model, or the merger inside a tower.
    """
    if not is_seeing(getattr(model, "config", None)):
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    body: Any = model.base_model
    language, output = text_part(model), model.get_output_embeddings()  # type: ignore[operator]
    parts: dict[str, list[str]] = {"language": [names[id(language)], names[id(output)]], "projector": [], "vision": []}
    for name, module in body.named_children():
        if module is language:
            continue
        inner = dict(module.named_children())
        if name in _TOWERS and _MERGER in inner:
            parts["projector"].append(names[id(inner[_MERGER])])
            parts["vision"] += [names[id(child)] for key, child in inner.items() if key != _MERGER]
        else:
            parts["vision" if name in _TOWERS else "projector"].append(names[id(module)])
    return parts


def processor_template(folder: Path) -> str | None:
    """The chat template of a processor in the file of earlier versions, which the tokenizer does not read."""
    file = folder / "chat_template.json"
    if not processor_class(folder) or not file.is_file() or (folder / "chat_template.jinja").is_file():
        return None
    template = read_json(file).get("chat_template")
    return template if isinstance(template, str) else None
