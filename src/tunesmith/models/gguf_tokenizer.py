"""What the conversion of a GGUF's tokenizer leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from tunesmith.models.headers import read_gguf

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Rules (tokenizer.ggml.pre) that cut digits apart before GPT-2's pattern splits the rest. Source: llama.cpp,
src/llama-vocab.cpp."""

AS_CONVERTED = (
    "default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "qwen35",
    "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2",
)  # fmt: skip
"""Rules that transformers 5.24 follows."""


def mend(tokenizer: PreTrainedTokenizerBase, path: Path, on_note: Callable[[str], None]) -> None:
    """Split text into words as the vocabulary was learnt, and limit its length to what the model was made for.

    transformers gives a rule that it does not know GPT-2's pattern: with SmolLM2, blanks in front of a digit would
    become other tokens than the model has seen.
    """
    header = read_gguf(path)
    rule = header.metadata.get("tokenizer.ggml.pre")
    byte_level = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and rule in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif byte_level and rule not in AS_CONVERTED:
        on_note(
            f"{path.name}: its rule for splitting text, {rule!r}, is not known here: some tokens may differ from those "
            "that the model has learnt. The model's Hugging Face folder, if there is one, is safer."
        )
    limit = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    for name in ("is_local", "local_files_only", "gguf_file"):
        tokenizer.init_kwargs.pop(name, None)  # how it was loaded here is nothing to save with it
