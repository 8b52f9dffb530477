"""Models that see, small enough for a test: one of each family, on disk as a person would have it, and rows for it."""

import io
import json
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from often import often
from tiny import tiny_tokenizer
from tiny_run import copied
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe

SIZE, HIDDEN = 16, 32
PIECES = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<start_of_image>",
    "<end_of_image>", "<image_soft_token>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|image>", "<|image|>",
    "<image|>", "<|audio>", "<|audio|>", "<audio|>",
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
    **dict.fromkeys(
        ("qwen2_5_vl", "qwen3_vl", "qwen3_5"), _EITHER.replace("PLACE", "<|vision_start|><|image_pad|><|vision_end|>")
    ),
    "llava_next": _EITHER.replace("PLACE", "<image>"),
    "llava_onevision": _EITHER.replace("PLACE", "<image>"),
    "gemma4": _EITHER.replace("PLACE", "<|image|>"),
    "internvl": _EITHER.replace("PLACE", "<IMG_CONTEXT>"),
    "mistral3": _EITHER.replace("PLACE", "[IMG]"),
}
"""Idefics 3 and SmolVLM print nothing of a text that is no list, as their real templates."""
FAMILIES = tuple(TEMPLATES)
USUAL = ("qwen3_vl", "gemma3")
"""Tested at every change, others before a release: positions of three kinds and vectors of inner layers; images
that are read in both directions."""
EACH_FAMILY = often(FAMILIES, *USUAL)
_NAMED = {
    "llava": {"image_token": "<image>"},
    "idefics3": {},
    "smolvlm": {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
                "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "qwen2_5_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3_vl": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "qwen3_5": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "llava_next": {"image_token": "<image>"},
    "llava_onevision": {"image_token": "<image>", "video_token": "<video>"},
    "gemma4": {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
               "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"},
    "mistral3": {},
}  # fmt: skip
IMAGE_TOKENS = {"internvl": "<IMG_CONTEXT>", "mistral3": "[IMG]"}
"""The token that is filled with an image's vectors, where the tokenizer has another name for it."""
_SQUARE = {"height": SIZE, "width": SIZE}
_GRID = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
_TILES = {"size": {"longest_edge": 2 * SIZE}, "max_image_size": {"longest_edge": SIZE}}
_PROCESSORS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llava": ("LlavaProcessor", "CLIPImageProcessor", {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE},
              {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessor", _TILES, {"image_seq_len": 4}),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor", _TILES, {"image_seq_len": 4}),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessor", {"size": _SQUARE}, {"image_seq_length": 4}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor",
                   {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 512}}, {}),
    **dict.fromkeys(("qwen3_vl", "qwen3_5"), ("Qwen3VLProcessor", "Qwen2VLImageProcessor",
                    {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 512}}, {})),
    "llava_next": ("LlavaNextProcessor", "LlavaNextImageProcessor",
                   {"size": {"shortest_edge": SIZE}, "crop_size": _SQUARE, "image_grid_pinpoints": _GRID},
                   {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor",
                        {"size": _SQUARE, "image_grid_pinpoints": _GRID},
                        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
    "gemma4": ("Gemma4Processor", "Gemma4ImageProcessor",
               {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}, {"image_seq_length": 70}),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessor", {"size": _SQUARE, "max_patches": 4},
                 {"image_seq_length": 4}),
    "mistral3": ("PixtralProcessor", "PixtralImageProcessor",
                 {"patch_size": {"height": 4, "width": 4}, "size": {"longest_edge": 2 * SIZE}},
                 {"patch_size": 4, "spatial_merge_size": 2}),
}  # fmt: skip
_TEXT = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 3}  # fmt: skip
_EYES = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": SIZE}  # fmt: skip


_CLIP = {**_EYES, "model_type": "clip_vision_model", "patch_size": 8, "projection_dim": HIDDEN}
_SIGLIP = {**_EYES, "model_type": "siglip_vision_model", "patch_size": 4, "vision_use_head": False}
_QWEN_EYES = {"depth": 2, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": HIDDEN, "num_position_embeddings": 16}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": ({"model_type": "llama"}, _CLIP, {}),
    "llava_next": ({"model_type": "llama"}, _CLIP, {"image_grid_pinpoints": _GRID}),
    "llava_onevision": ({"model_type": "llama"}, _SIGLIP, {"image_grid_pinpoints": _GRID}),
    "idefics3": ({"model_type": "llama"}, {**_EYES, "model_type": "idefics3_vision", "patch_size": 4},
                 {"scale_factor": 2, "pad_token_id": 3}),
    "smolvlm": ({"model_type": "llama"}, {**_EYES, "model_type": "smolvlm_vision", "patch_size": 4},
                {"scale_factor": 2, "pad_token_id": 3}),
    "gemma3": ({"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
                "sliding_window_pattern": 2}, _SIGLIP, {"mm_tokens_per_image": 4}),
    "gemma4": ({"model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 8, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8,
                "use_bidirectional_attention": "vision"},
               {"model_type": "gemma4_vision", "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
                "pooling_kernel_size": 2, "position_embedding_size": 300}, {"audio_config": None}),
    "qwen2_5_vl": ({"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
                   {**_QWEN_EYES, "window_size": 16, "fullatt_block_indexes": [1]}, {}),
    "qwen3_vl": ({"head_dim": 8, "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
                 {**_QWEN_EYES, "depth": 3, "deepstack_visual_indexes": [0, 1]}, {}),
    "qwen3_5": ({"head_dim": 32, "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                 "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                 "rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
                                     "partial_rotary_factor": 0.25}}, _QWEN_EYES, {}),
    "internvl": ({"model_type": "qwen2"}, {**_EYES, "patch_size": 4},
                 {"image_seq_length": 4, "tie_word_embeddings": False}),
    "mistral3": ({"model_type": "mistral", "head_dim": 8, "sliding_window": None},
                 {**_EYES, "model_type": "pixtral", "image_size": 4 * SIZE, "patch_size": 4},
                 {"tie_word_embeddings": False}),
}  # fmt: skip
"""(text, eyes, the rest) of a config."""
_IDS = {"image_token_id": "image_token", "video_token_id": "video_token", "boi_token_index": "boi_token",
        "eoi_token_index": "eoi_token", "boi_token_id": "boi_token", "eoi_token_id": "eoi_token",
        "audio_token_id": "audio_token"}  # fmt: skip
_QWEN_IDS = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}


def _config(family: str, tokenizer: Any) -> Any:
    text, eyes, rest = _CONFIGS[family]
    named = {"image_token": IMAGE_TOKENS.get(family, "<image>"), **_NAMED[family]}
    words = {key: named[name] for key, name in _IDS.items() if name in named}
    words |= _QWEN_IDS if family.startswith("qwen") else {}
    ids = {key: int(tokenizer.convert_tokens_to_ids(word)) for key, word in words.items()}
    sizes = {**_TEXT, "vocab_size": len(tokenizer)}
    sizes |= {"vocab_size_per_layer_input": len(tokenizer)} if family == "gemma4" else {}
    return AutoConfig.for_model(family, text_config={**sizes, **text}, vision_config=eyes, **ids, **rest)


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
        if family == "qwen3_5":  # transformers reads its files by this class, whatever they say
            with TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                tokenizer = Qwen3_5Tokenizer.from_pretrained(folder)
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
