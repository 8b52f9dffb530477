"""GGUF files: what the header says, read without trusting it, and repairs of what transformers makes of it.

A file with wrong sizes is refused here, before a loader maps memory by them.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError
from tunesmith.models.folder import DamagedError, TensorInfo
from tunesmith.types import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DIMENSIONS = 8
MAX_ENTRIES = 1_000_000

SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
"""Rules (tokenizer.ggml.pre) that separate digits before GPT-2's pattern splits the rest. Source: llama.cpp,
src/llama-vocab.cpp."""
AS_CONVERTED = (
    "default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "qwen35",
    "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2",
)  # fmt: skip
"""Rules that transformers 5.24 follows."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The first part of a GGUF file."""

    metadata: Record
    """Numbers, texts and lists of numbers by key; a list of texts as their number."""
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_gguf(path: Path) -> GgufHeader:
    """The metadata and tensors of a GGUF file.

    Raises ModelError, naming the file, where sizes or offsets do not fit each other and the file.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        with open(path, "rb") as file:
            if path.stat().st_size < 24:
                raise DamagedError("it ends before its header does")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _header(_Cursor(content))
    except (DamagedError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: a damaged GGUF file: {error}. Download or copy it again.") from error


class _Cursor:
    """A position in a file that never leaves it."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.place = 0

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.content) - self.place:
            raise DamagedError(f"it ends at byte {len(self.content):,}, in the middle of its header")
        self.place += num_bytes
        return self.content[self.place - num_bytes : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def _header(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise DamagedError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise DamagedError(f"it is of version {version}; 2 and 3 can be read")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    if max(num_tensors, num_keys) > MAX_ENTRIES:
        raise DamagedError(f"it claims {num_tensors:,} tensors and {num_keys:,} keys")
    metadata = {cursor.text(): _value(cursor, cursor.number("I")) for _ in range(num_keys)}
    if not isinstance(metadata.get("general.architecture"), str):
        raise DamagedError("it does not say its general.architecture")
    entries = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise DamagedError(f"its alignment is {alignment!r}")
    data_bytes = len(cursor.content) - -(-cursor.place // alignment) * alignment
    for name, info, offset, num_bytes in entries:
        if offset + num_bytes > data_bytes:
            where = f"ends at byte {offset + num_bytes:,} of the data, which has {max(data_bytes, 0):,}"
            raise DamagedError(f"tensor {name!r} of shape {list(info.shape)} {where}")
    return GgufHeader(metadata, {name: info for name, info, _, _ in entries})


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    if kind == _TEXT:
        return cursor.text()
    if kind != _LIST:
        raise DamagedError(f"a value of the unknown type {kind}")
    of, count = cursor.number("I"), cursor.number("Q")
    if of == _TEXT:
        for _ in range(count):  # ends with the file at the latest: each takes 8 bytes or more
            cursor.take(cursor.number("Q"))
        return count
    if of not in _NUMBERS:
        raise DamagedError(f"a list of the type {of}")
    code = _NUMBERS[of]
    return list(struct.unpack(f"<{count}{code}", cursor.take(count * struct.calcsize("<" + code))))


def _entry(cursor: _Cursor) -> tuple[str, TensorInfo, int, int]:
    """Name, shape and type of a tensor, its offset in the data and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, num_dimensions = cursor.text(), cursor.number("I")
    if num_dimensions > MAX_DIMENSIONS:
        raise DamagedError(f"tensor {name!r} has {num_dimensions} dimensions")
    # ggml writes the fastest dimension first, torch last
    shape = tuple(cursor.number("Q") for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in list(GGMLQuantizationType):
        raise DamagedError(f"tensor {name!r} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not shape or shape[-1] % block:
        raise DamagedError(f"tensor {name!r} of shape {list(shape)} cannot be cut into blocks of {block}")
    return name, TensorInfo(shape, GGMLQuantizationType(kind).name), offset, prod(shape) // block * block_bytes


def fix_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path, on_note: Callable[[str], None]) -> None:
    """Split text as the vocabulary was learnt, and limit its length to what the model was made for.

    transformers gives a rule that it does not know GPT-2's pattern: with SmolLM2, blanks in front of a digit
    would become other tokens than the model has seen.
    """
    from tokenizers import pre_tokenizers

    header = read_gguf(path)
    rule = header.metadata.get("tokenizer.ggml.pre")
    byte_level = header.metadata.get("tokenizer.ggml.model") == "gpt2"
    if byte_level and rule in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif byte_level and rule not in AS_CONVERTED:
        on_note(
            f"{path.name}: its rule for splitting text, {rule!r}, is not known here: some tokens may differ "
            "from those that the model has learnt. The model's Hugging Face folder, if there is one, is safer."
        )
    limit = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    for name in ("is_local", "local_files_only", "gguf_file"):
        tokenizer.init_kwargs.pop(name, None)  # how it was loaded here is not to be saved with it


_READING = threading.RLock()


@contextmanager
def read_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once; one thread at a time, as they share the gguf package.

    It parses the file for the config and again for the weights, and makes the table of llama.cpp's names for
    every module of the model: without the cache loading takes five times as long (14 s for SmolLM2-135M).
    """
    import gguf

    with _READING:
        originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)}
        for name, original in originals.items():
            setattr(gguf, name, cache(_fast_reader(original) if name == "GGUFReader" else original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(gguf, name, original)


def _fast_reader(reader: Any) -> Any:
    """A reader over a plain array: a vocabulary takes half a million slices, which take three times as long
    from a memory-mapped array."""
    if not isinstance(reader, type):  # inside another block
        return reader
    import numpy as np

    class FastReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray) if isinstance(mapped, np.memmap) else mapped

    return FastReader
