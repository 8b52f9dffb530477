"""Make a tiny LLaVA with random weights and a tokenizer of some texts: `python scripts/tiny_llava.py FOLDER FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

SIZE, PATCH, HIDDEN = 16, 8, 32
"""Pixels of an image's side and of a patch's, numbers of a token."""
CONTROL = ("<pad>", "<image>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main(folder: Path, texts: Path) -> None:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(CONTROL), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([texts.read_text("utf-8"), "user\nassistant\n"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>", model_max_length=512,
        chat_template=TEMPLATE, extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "pad_token_id": 0, **sizes}  # fmt: skip
    tower = {"model_type": "clip_vision_model", "num_attention_heads": 2, "image_size": SIZE, "patch_size": PATCH,
             "projection_dim": HIDDEN, **sizes}  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = AutoConfig.for_model("llava", text_config=text, vision_config=tower, image_token_index=image)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
              "size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}  # fmt: skip
    processor = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "num_additional_image_tokens": 1,
                 "vision_feature_select_strategy": "default"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(images), "utf-8")
    (folder / "processor_config.json").write_text(json.dumps(processor), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
