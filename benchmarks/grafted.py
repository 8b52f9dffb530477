"""`python -m benchmarks.grafted MODEL FOLDER`: a chat model with a vision tower and projector of random weights.

No pretrained model that sees is small enough to come with the project. What the parts of one cost does not depend on
their weights: `--shape photos` makes SmolVLM's out of SmolLM2-135M, whose language part it is; `small` a LLaVA with
CLIP's tower for 224 × 224 pixels; `words` a LLaVA that reads white as nothing, for pictures of a word.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TILES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
_NAMED = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}  # fmt: skip
SIZE = 64
"""Side of a picture of a word, in pixels."""


def _llava(side: int, patch: int, *, colours: Mapping[str, Any] | None = None, **tower: int) -> dict[str, Any]:
    """The shape of a LLaVA for square pictures. `colours`: what becomes 0 and 1, where it is not as in CLIP."""
    return {
        "family": "llava",
        "pieces": ["<image>"],
        "named": {"image_token": "<image>"},
        "vision": {"model_type": "clip_vision_model", "image_size": side, "patch_size": patch, "projection_dim": 512,
                   **tower},
        "more": {},
        "images": {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
                   "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **(colours or {})},
        "processor": {"processor_class": "LlavaProcessor", "patch_size": patch, "num_additional_image_tokens": 1,
                      "vision_feature_select_strategy": "default"},
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "photos": {
        "family": "smolvlm",
        "pieces": [*_NAMED.values(), *_TILES],
        "named": _NAMED,
        "vision": {"model_type": "smolvlm_vision", "hidden_size": 768, "intermediate_size": 3072, "image_size": 512,
                   "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16},
        "more": {"scale_factor": 4},
        "images": {"image_processor_type": "SmolVLMImageProcessor", "processor_class": "SmolVLMProcessor",
                   "size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}},
        "processor": {"processor_class": "SmolVLMProcessor", "image_seq_len": 64},
    },
    "small": _llava(224, 16, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    "words": _llava(SIZE, 32, hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                    colours={"image_mean": [1, 1, 1], "image_std": [0.25, 0.25, 0.25]}),
}  # fmt: skip
"""What each is made of: the family, the tokens that it adds, its tower, and the files of its processor."""


def graft(model: str, folder: Path, shape: str) -> Path:
    """The folder, with the chat model's weights in the language part."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tunesmith.models.load import load_model, load_tokenizer
    from tunesmith.models.resolve_model import resolve_model

    made = SHAPES[shape]
    located = resolve_model(model, offline=True)
    tokenizer = load_tokenizer(located, None)
    tokenizer.add_special_tokens({"additional_special_tokens": made["pieces"]})
    tokenizer._set_model_specific_special_tokens(special_tokens=made["named"])
    tokenizer.init_kwargs["extra_special_tokens"] = made["named"]
    tokenizer.chat_template = TEMPLATE
    text = load_model(located, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    text.resize_token_embeddings(len(tokenizer))
    image = tokenizer.convert_tokens_to_ids("<image>")
    settings = {"image_token_id": image} if made["family"] == "smolvlm" else {"image_token_index": image}
    config = AutoConfig.for_model(
        made["family"], text_config=text.config.to_dict(), vision_config=made["vision"], **made["more"], **settings,
        tie_word_embeddings=text.config.tie_word_embeddings, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    grafted = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    language = grafted.model.language_model if made["family"] == "llava" else grafted.model.text_model
    language.load_state_dict(text.model.state_dict())
    grafted.lm_head.load_state_dict(text.lm_head.state_dict())
    grafted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write(folder / "preprocessor_config.json", made["images"])
    _write(folder / "processor_config.json", made["processor"])
    return folder


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), "utf-8")


def photos(folder: Path, num: int) -> Path:
    """Rows about so many pictures of 1,024 × 768, each with a question and an answer of a hundred words in all."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(num):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        picture = Image.fromarray(coarse).resize((1024, 768), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        words = " ".join(f"colour {value}" for value in coarse.ravel()[:40])
        lines.append({"images": [f"{number}.jpg"], "prompt": "<image>Which colours are on it?", "completion": words})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grafted", description=__doc__)
    parser.add_argument("model", help="a chat model of Llama's shape, such as SmolLM2-135M-Instruct: a folder or .gguf")
    parser.add_argument("folder", type=Path, help="where the model goes, and with --photos rows about pictures")
    parser.add_argument("--shape", choices=list(SHAPES), default="photos")
    parser.add_argument("--photos", type=int, default=0, help="so many rows beside it, in FOLDER/photos")
    options = parser.parse_args()
    print(graft(options.model, options.folder, options.shape))
    if options.photos:
        print(photos(options.folder / "photos", options.photos))


if __name__ == "__main__":
    main()
