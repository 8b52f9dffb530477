"""Models that see, small enough for a test: one of each family, on disk as a person would have it, and rows for it."""

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

from tiny import tiny_tokenizer
from tiny_run import copied
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe

SIZE, HIDDEN = 16, 32
PIECES = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<start_of_image>",
    "<end_of_image>", "<image_soft_token>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)),
)  # fmt: skip
_EITHER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}PLACE{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LISTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'image' %}PLACE"
    "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "llava": _EITHER.replace("PLACE", "<image>"),
    "idefics3": _LISTS.replace("PLACE", "<image>"),
    "smolvlm": _LISTS.replace("PLACE", "<image>"),
    "gemma3": _EITHER.replace("PLACE", "<start_of_image>"),
    "qwen2_5_vl": _EITHER.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>"),
}
"""Idefics 3 and SmolVLM print nothing of a text that is no list, as their real templates."""
FAMILIES = tuple(TEMPLATES)
_NAMED = {
    "llava": {"image_token": "<image>"},
    "idefics3": {},
    "smolvlm": {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "qwen2_5_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
}  # fmt: skip
_SQUARE = {"height": SIZE, "width": SIZE}
_TILES = {"size": {"longest_edge": 2 * SIZE}, "max_image_size": {"longest_edge": SIZE}}
_PROCESSORS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava": ("LlavaProcessor", "CLIPImageProcessor", {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE},
              {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessor", _TILES, {"image_seq_len": 4}),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor", _TILES, {"image_seq_len": 4}),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessor", {"size": _SQUARE}, {"image_seq_length": 4}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor",
                   {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 512}}, {}),
}  # fmt: skip
_TEXT = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 3}  # fmt: skip
_EYES = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": SIZE}  # fmt: skip


def _config(family: str, tokenizer: Any) -> Any:
    def token(text: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(text))

    text = {**_TEXT, "vocab_size": len(tokenizer)}
    if family == "llava":
        eyes = {**_EYES, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": HIDDEN}
        return AutoConfig.for_model(
            "llava", text_config={**text, "model_type": "llama"}, vision_config=eyes, image_token_index=token("<image>")
        )
    if family in ("idefics3", "smolvlm"):
        eyes = {**_EYES, "patch_size": 4, "model_type": "idefics3_vision" if family == "idefics3" else "smolvlm_vision"}
        return AutoConfig.for_model(
            family, text_config={**text, "model_type": "llama"}, vision_config=eyes, scale_factor=2,
            image_token_id=token("<image>"), pad_token_id=3,
        )  # fmt: skip
    if family == "gemma3":
        eyes = {**_EYES, "patch_size": 4, "model_type": "siglip_vision_model", "vision_use_head": False}
        more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "sliding_window_pattern": 2}
        return AutoConfig.for_model(
            "gemma3", text_config={**text, **more, "model_type": "gemma3_text"}, vision_config=eyes,
            mm_tokens_per_image=4, image_token_index=token("<image_soft_token>"),
            boi_token_index=token("<start_of_image>"), eoi_token_index=token("<end_of_image>"),
        )  # fmt: skip
    eyes = {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
            "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    return AutoConfig.for_model(
        "qwen2_5_vl", text_config={**text, "rope_parameters": rope}, vision_config=eyes,
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"),
    )  # fmt: skip


class _Files:
    """The processor's files, written as they are."""

    def __init__(self, family: str) -> None:
        self._family = family

    def save_pretrained(self, folder: Path) -> None:
        name, images, settings, own = _PROCESSORS[self._family]
        made = get_image_processor_class_from_name(f"{images}Pil")(**settings).to_dict()
        made |= {"image_processor_type": images, "processor_class": name}
        (folder / "preprocessor_config.json").write_text(json.dumps(made), "utf-8")
        (folder / "processor_config.json").write_text(json.dumps({**own, "processor_class": name}), "utf-8")


def vision_folder(path: Path, family: str) -> Path:
    """A model that sees with its tokenizer and processor, no weight of it left at zero."""

    def make() -> tuple[PreTrainedModel, Any, _Files]:
        tokenizer = tiny_tokenizer(TEMPLATES[family])
        tokenizer.add_special_tokens({"additional_special_tokens": list(PIECES)})
        if named := _NAMED[family]:
            tokenizer._set_model_specific_special_tokens(special_tokens=named)
            tokenizer.init_kwargs["extra_special_tokens"] = named
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(_config(family, tokenizer), dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(0.3 * torch.randn_like(weight) / max(1, weight.shape[-1]) ** 0.5 + (weight.ndim < 2))
        return model, tokenizer, _Files(family)

    return copied(path, f"sees-{family}", make)


@lru_cache
def picture(number: int, width: int = 24, height: int = 16) -> Image.Image:
    """Coloured noise, another one for each number."""
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))


def png(image: Image.Image, **options: Any) -> bytes:
    """Its file."""
    content = io.BytesIO()
    image.save(content, options.pop("format", "PNG"), **options)
    return content.getvalue()


ROWS = ((), ((24, 16),), ((16, 16), (20, 32)), ((16, 16), (16, 16)))
"""Sizes of the images of four rows: none, one, two in different turns, two that are neighbours."""


def rows_with_images(folder: Path) -> Path:
    """The rows of `ROWS` as OpenAI writes them, each image a file of its own beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    number, lines = 0, []
    for row, sizes in enumerate(ROWS):
        parts = []
        for size in sizes:
            number += 1
            (folder / f"{number}.png").write_bytes(png(picture(number, *size)))
            parts.append({"type": "image_url", "image_url": {"url": f"{number}.png"}})
        first = [{"type": "text", "text": f"What is the {row}?"}, *(parts if row == 3 else parts[:1])]
        turns: list[tuple[str, Any]] = [("user", first), ("assistant", "a lazy dog")]
        if row == 2:
            turns += [("user", [parts[1], {"type": "text", "text": "And this?"}]), ("assistant", "brown fox")]
        lines.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


NAMES = ("red", "green", "blue", "brown", "lazy", "dog")


def questions(folder: Path, num: int = 12, **fields: Any) -> Path:
    """Questions about six pictures, two for each."""
    lines = []
    for i in range(num):
        (folder / f"{i % 6}.png").write_bytes(png(picture(i % 6)))
        asked = "What is it?" if i < 6 else "Which one, please?"
        lines.append({"images": [f"{i % 6}.png"], "prompt": f"<image>{asked}", "completion": NAMES[i % 6], **fields})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder / "rows.jsonl"


def vision_recipe(folder: Path, family: str = "llava", **sections: Any) -> Recipe:
    """A recipe over `questions`: a model of a family, LoRA, two epochs of three steps."""
    data: dict[str, Any] = {
        "model": str(vision_folder(folder / "model", family)),
        "task": "chat",
        "method": {"name": "lora", "rank": 4},
        "data": {"train": [str(questions(folder))], "held_out": 0.2},
        "optim": {"lr": 1e-2},
        "train": {"epochs": 2, "rows_per_step": 4, "tokens_per_pass": 256},
        "evaluation": {"samples": 2, "sample_tokens": 4, "general": False},
        "checkpoint": {"every": 2},
        "precision": "float32",
        "device": "cpu",
        "threads": 1,
    }
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) and name != "method" else value
    return validate(data)
