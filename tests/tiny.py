"""Tokenizers and conversations small enough to be made inside a test."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tunesmith.types import Example, Part, Source

TEMPLATES = Path(__file__).parent / "data" / "templates"

SPECIALS = (
    "<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "<|user|>", "<|assistant|>", "<|end|>",
)  # fmt: skip
"""Control tokens of every chat family in tests/data/templates."""

TEXT = (
    "The quick brown fox jumps over the lazy dog. What is the tallest mountain on Earth?",
    "user\nassistant\nsystem\nYou are a helpful assistant who answers in one sentence.",
    "Hello there, how can I help you today? I am fine, thank you. And you?\n\nYes, please.",
    "def area(width, height):\n    return width * height  # 12 * 34 == 408",
    "In 2024 there were 1000 of them, 22 in 333 and 4444 before 2024.",
    "今日はいい天気ですね。 山は高いです。 Ça va très bien, merci beaucoup.",
)


def template(name: str) -> str:
    """The text of a fixture chat template: chatml, llama3, gemma, ..."""
    return (TEMPLATES / f"{name}.jinja").read_text("utf-8").removesuffix("\n")


CHATML = template("chatml")


def chat(
    *turns: tuple[str, str] | tuple[str, str, Mapping[str, Any]],
    tools: tuple[Mapping[str, Any], ...] = (),
    line: int = 1,
) -> Example:
    """A conversation of (role, text) or (role, text, fields); the assistant's turns are trained."""
    parts = (Part(turn[0], turn[1], turn[0] == "assistant", turn[2] if len(turn) > 2 else {}) for turn in turns)
    return Example(tuple(parts), Source("chat.jsonl", line), "messages", tools)


def pair(prompt: str, completion: str, *, line: int = 1) -> Example:
    """A prompt and the completion that is trained."""
    parts = (Part("user", prompt, False), Part("assistant", completion, True))
    return Example(parts, Source("pairs.jsonl", line), "prompt_completion", plain=True)


def tiny_tokenizer(
    template: str | None = CHATML,
    *,
    bos: str | None = "<s>",
    eos: str | None = "<|im_end|>",
    pad: str | None = "<pad>",
    adds_bos: bool = False,
    metaspace: bool = False,
    vocab_size: int = 512,
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer trained on a few lines: byte level as in GPT-2, or pieces with "▁" for spaces as in Llama 2.

    `adds_bos` puts the BOS in front of plain text, as the tokenizers of Llama and Gemma do.
    """
    backend = Tokenizer.from_str(_trained(metaspace, vocab_size))
    if adds_bos:
        assert bos is not None
        bos_first = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
        backend.post_processor = processors.Sequence([*filter(None, [backend.post_processor]), bos_first])
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **{k: v for k, v in names.items() if v}
    )
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def _trained(metaspace: bool, vocab_size: int) -> str:
    specials = [AddedToken(text, special=True, normalized=False) for text in SPECIALS]
    if metaspace:
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        # Llama 2's normalizer puts "▁" in front of every stretch of text between control tokens.
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet: list[str] = []
        # Entries of the vocabulary for byte_fallback; they must not be matched in text, see the end of this function.
        specials += [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    if metaspace:  # words are learnt one by one, and read without a split, as sentencepiece does both
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated")]
        )
    backend.train_from_iterator(TEXT, trainer)
    saved = json.loads(backend.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    if metaspace:
        saved["pre_tokenizer"] = None
    return json.dumps(saved)
