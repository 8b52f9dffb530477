"""A tokenizer in a GGUF: tokens with their types, merges or scores, pre-tokenizer, special tokens, template.

The pre-tokenizer splits text into words before merging. A wrong name gives other tokens than the model was
trained with, and no error. It is found by the hash of the tokens of a fixed text, as in llama.cpp, which
identifies published tokenizers; or by the steps in the tokenizer's file, which also identify tokenizers with
added tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import normalizers
from transformers import PreTrainedTokenizerBase

from tunesmith.errors import ModelError
from tunesmith.export.run_result import RunResult
from tunesmith.models import load
from tunesmith.models.gguf import read_gguf
from tunesmith.models.resolve_model import ModelRef
from tunesmith.tasks import TASKS
from tunesmith.types import JsonObject, Part, Record

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE "
    "you sure? 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
"""The text whose tokens llama.cpp hashes (`chktxt`)."""

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
"""Patterns of published tokenizers; they differ in how many digits are one word."""
_SPLITS = {LLAMA3_SPLIT: "llama-bpe", QWEN2_SPLIT: "qwen2"}


@dataclass(frozen=True)
class GgufVocabulary:
    """The tokenizer of a GGUF."""

    model: str
    """gpt2: byte-level BPE; llama: sentencepiece."""
    pre: str
    """llama.cpp's name of the pre-tokenizer."""
    backend: Record
    """Content of tokenizer.json."""


def probe_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokens of PROBE."""
    return hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()


def find_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, *, of_gguf: str | None) -> str:
    """Pre-tokenizer of a byte-level tokenizer, as the GGUF that it came from names it, else by hash or steps.

    Raises ModelError if none is found, or if the tokenizer contradicts the GGUF.
    """
    pre_tokenizer = HASHES.get(probe_hash(tokenizer)) or pre_tokenizer_of_steps(tokenizer)
    way_out = "Export merged, and convert that with llama.cpp's convert_hf_to_gguf.py."
    if of_gguf is not None and pre_tokenizer in (None, of_gguf):
        return of_gguf
    if of_gguf is not None:
        raise ModelError(
            f"gguf: the file that was tuned names the pre-tokenizer {of_gguf}, but its tokenizer follows "
            f"{pre_tokenizer}. {way_out}"
        )
    if pre_tokenizer is None:
        name, digest = tokenizer.name_or_path, probe_hash(tokenizer)[:16]
        raise ModelError(f"gguf: the pre-tokenizer of {name} is unknown (hash {digest}). {way_out}")
    return pre_tokenizer


def pre_tokenizer_of_steps(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The pre-tokenizer that the steps in the tokenizer's file define; None if they are unknown."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if (backend.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        return None
    step = backend.get("pre_tokenizer") or {}
    match [_step(part) for part in step.get("pretokenizers", [step])]:
        case [("ByteLevel", True)]:
            return "gpt-2"
        case [("Digits", True), ("ByteLevel", True)]:
            return "smollm"
        case [("Split", str(pattern)), ("ByteLevel", False)]:
            return _SPLITS.get(pattern)
    return None


def _step(step: JsonObject) -> tuple[str, Any] | None:
    """A step with its relevant setting; None if llama.cpp has no such step."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel", step.get("use_regex", True)
    if kind == "Digits":
        return "Digits", step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return "Split", step["pattern"].get("Regex")
    return None


def find_vocabulary(result: RunResult) -> GgufVocabulary:
    """The tokenizer in llama.cpp's terms. Raises ModelError if llama.cpp has no such tokenizer."""
    tokenizer = result.tokenizer
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"gguf: a tokenizer of the type {model['type']} cannot be written. Export merged instead, and "
            "convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    if model.get("byte_fallback"):
        return GgufVocabulary("llama", "default", backend)  # sentencepiece has none
    base = result.base
    of_gguf = read_gguf(base.path).metadata.get("tokenizer.ggml.pre") if base.is_gguf else None
    return GgufVocabulary("gpt2", find_pre_tokenizer(tokenizer, of_gguf=of_gguf), backend)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: GgufVocabulary, result: RunResult, *, num_rows: int) -> None:
    """Write the tokenizer. `num_rows`: rows of the embedding, which may be more than there are tokens."""
    tokenizer, backend = result.tokenizer, vocabulary.backend
    tokens, types = _tokens(tokenizer, backend, num_rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges([" ".join(_pair(merge)) for merge in backend["model"]["merges"]])
    else:
        writer.add_token_scores(_scores(tokens, types, backend))
        steps = json.dumps([backend.get("normalizer"), backend.get("pre_tokenizer")])
        is_never = '"prepend_scheme": "never"' in steps
        writer.add_add_space_prefix('"Prepend"' in steps or ('"Metaspace"' in steps and not is_never))
    for name, token_id in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unk", tokenizer.unk_token_id),
        ("pad", tokenizer.pad_token_id),
        ("eot", _end_of_turn(result)),
    ):
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(int(token_id))
    writer.add_add_bos_token(begins_with_bos(result))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _end_of_turn(result: RunResult) -> int | None:
    """The token that ends an answer, if that is not the EOS."""
    return next((stop for stop in result.renderer.stop_ids if stop != result.tokenizer.eos_token_id), None)


def begins_with_bos(result: RunResult) -> bool:
    """Whether llama.cpp has to prepend a BOS: if the tokenizer does so, and prompts of training begin with one.

    If the chat template writes it as well, llama.cpp drops one. If the template alone writes it, or begins with
    another control token that is also called BOS (SmolLM2), it is left to the template.
    """
    bos = result.tokenizer.bos_token_id
    role = TASKS[result.renderer.task_name].input_role
    prompt = result.renderer.prompt_ids([Part(role, "Hi", False)])
    return bos is not None and prompt[:1] == [bos] and result.tokenizer("a")["input_ids"][:1] == [bos]


def _tokens(tokenizer: PreTrainedTokenizerBase, backend: Record, num_rows: int) -> tuple[list[str], list[int]]:
    words = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = {token["id"]: token for token in backend["added_tokens"]}
    kind = gguf.TokenType
    tokens, types = [], []
    for token_id in range(num_rows):
        token = words.get(token_id)
        if token is None:
            tokens.append(f"[PAD{token_id}]")
            types.append(kind.UNUSED)
            continue
        tokens.append(token)
        if token_id == tokenizer.unk_token_id and backend["model"].get("byte_fallback"):
            types.append(kind.UNKNOWN)
        elif token_id in added:
            types.append(kind.CONTROL if added[token_id]["special"] else kind.USER_DEFINED)
        elif backend["model"].get("byte_fallback") and _BYTE.fullmatch(token):
            types.append(kind.BYTE)
        else:
            types.append(kind.NORMAL)
    return tokens, [int(k) for k in types]


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _scores(tokens: list[str], types: list[int], backend: Record) -> list[float]:
    """Sentencepiece merges the pair with the highest score; merges are listed in that order."""
    places: dict[str, int] = {}
    for merge in backend["model"]["merges"]:
        places.setdefault("".join(_pair(merge)), len(places))
    normal = int(gguf.TokenType.NORMAL)
    return [
        -float(places.get(token, len(places))) if kind == normal else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def read_tokenizer(located: ModelRef) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF, which splits text as llama.cpp does."""
    facts = read_gguf(located.path).metadata
    tokenizer = load.load_tokenizer(located, None)
    if facts.get("tokenizer.ggml.model") == "llama":
        # llama.cpp puts a space in front of every text between control tokens, or of none; transformers guesses
        # by the architecture.
        steps: list[Any] = [normalizers.Replace(" ", "▁")]
        if facts.get("tokenizer.ggml.add_space_prefix", True):
            steps.insert(0, normalizers.Prepend("▁"))
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer
