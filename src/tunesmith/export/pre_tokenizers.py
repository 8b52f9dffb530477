"""The rule by which a vocabulary splits text into words before it looks for tokens, under llama.cpp's name for it.

A wrong name gives other tokens than the model has learnt, and no error. It is found in two ways: by the hash of the
tokens of a fixed text, as llama.cpp does it, which knows published tokenizers; and by the steps of the tokenizer's own
file, which also knows those that gained tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tunesmith.errors import ModelError

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""The text of llama.cpp's check (`chktxt`). Its hash is defined by it."""

HASHES = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
}
"""SHA-256 of the probe's tokens (`chkhsh`), by llama.cpp's convert_hf_to_gguf_update.py."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT, QWEN2_SPLIT = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST
"""Patterns of published tokenizers; they differ in how many digits stand together."""
_SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and how it was found."""

    name: str
    how: str


def probe_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokens of llama.cpp's check text."""
    return hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()


def find_rule(tokenizer: PreTrainedTokenizerBase, *, given: str | None, of_gguf: str | None) -> Rule:
    """The rule of a byte-level tokenizer: what was `given`, else that of the GGUF it came from, else by hash or steps.

    Raises ModelError where none is found, or where what is known of the tokenizer contradicts what was given.
    """
    by_hash, by_steps = HASHES.get(probe_hash(tokenizer)), rule_of_steps(tokenizer)
    found = by_hash or by_steps
    if given is not None:
        if found not in (None, given):
            raise ModelError(
                f"--pre: {given}: by its {'tokens' if by_hash else 'file'} this tokenizer splits text by the rule "
                f"{found}: under another name the model would read other tokens. Leave --pre out."
            )
        return Rule(given, "given by --pre")
    if of_gguf is not None and found in (None, of_gguf):
        return Rule(of_gguf, "the GGUF that was tuned names it")
    if of_gguf is not None:
        raise ModelError(
            f"gguf: the file that was tuned names the rule {of_gguf} of splitting text, its tokenizer follows "
            f"{found}. Name the right one with --pre {found}, if that is so."
        )
    if found is None:
        raise ModelError(
            f"gguf: the rule by which {tokenizer.name_or_path} splits text is none that is known here (hash "
            f"{probe_hash(tokenizer)[:16]}). Name it with --pre if llama.cpp has it; its tokens will be compared."
        )
    return Rule(found, "found by a hash of its tokens" if by_hash else "found by the steps in its file")


def rule_of_steps(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The rule that the tokenizer's own steps spell out, if they are those of one that is known."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if (backend.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    step = backend.get("pre_tokenizer") or {}
    match [_step(one) for one in step.get("pretokenizers", [step])]:
        case [("ByteLevel", True)]:
            return "gpt-2"
        case [("Digits", True), ("ByteLevel", True)]:
            return "smollm"
        case [("Split", str(pattern)), ("ByteLevel", False)]:
            return _SPLITS.get(pattern)
    return None


def _step(step: dict[str, Any]) -> tuple[str, Any] | None:
    """A step and what matters of it; None for one that llama.cpp has no counterpart of."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel", step.get("use_regex", True)
    if kind == "Digits":
        return "Digits", step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return "Split", step["pattern"].get("Regex")
    return None
