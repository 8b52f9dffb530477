"""What weight files say about themselves, read without trusting them and without their weights.

A file that lies about its sizes is named here, before a loader maps memory by its word.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import orjson

from tunesmith.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""
MAX_DIMENSIONS = 8
MAX_GGUF_ENTRIES = 1_000_000

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64,
}  # fmt: skip
"""Bits of an element of each dtype of the safetensors format."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: its shape in torch's order, and how it is stored."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The first part of a GGUF file."""

    metadata: Mapping[str, Any]
    """Numbers, texts and lists of numbers by key; a list of texts as how many there are."""
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


class _BrokenError(Exception):
    """Why a header cannot be right; the caller knows the file."""


def read_safetensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name.

    Raises ModelError, naming the file, where sizes or offsets do not fit each other and the file, byte for byte.
    Source: https://github.com/huggingface/safetensors#format
    """
    try:
        return _safetensors(path)
    except _BrokenError as error:
        raise ModelError(f"{path}: a damaged safetensors file: {error}. {_AGAIN}") from error


def read_gguf(path: Path) -> GgufHeader:
    """The metadata and tensors of a GGUF file.

    Raises ModelError, naming the file, where sizes or offsets do not fit each other and the file.
    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    try:
        with open(path, "rb") as file:
            if path.stat().st_size < 24:
                raise _BrokenError("it ends before its header does")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _gguf(_Cursor(content))
    except (_BrokenError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: a damaged GGUF file: {error}. {_AGAIN}") from error


_AGAIN = "Download or copy it again."


def _safetensors(path: Path) -> dict[str, TensorInfo]:
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _BrokenError(f"it has {file_bytes} bytes, fewer than its header")
        header_bytes = int.from_bytes(start, "little")
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise _BrokenError(f"it claims a header of {header_bytes:,} bytes in a file of {file_bytes:,}")
        try:
            header = orjson.loads(file.read(header_bytes))
        except orjson.JSONDecodeError as error:
            raise _BrokenError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _BrokenError("its header is not a JSON object")
    header.pop("__metadata__", None)
    spans = sorted((_span(name, entry), name) for name, entry in header.items())
    end = 0
    for (first, last), name in spans:
        if first != end:
            raise _BrokenError(f"tensor {name!r} begins at byte {first:,} of the data where {end:,} is due")
        end = last
    if 8 + header_bytes + end != file_bytes:
        raise _BrokenError(f"it should have {8 + header_bytes + end:,} bytes and has {file_bytes:,}")
    return {name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}


def _span(name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends in the data, if its entry makes sense."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _BrokenError(f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _BrokenError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _BrokenError(f"tensor {name!r} has the shape {shape!r} at {offsets!r}")
    if prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _BrokenError(f"tensor {name!r} of shape {shape} and dtype {dtype} does not fill bytes {offsets}")
    return offsets[0], offsets[1]


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


class _Cursor:
    """A place in a file that cannot be moved out of it."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.place = 0

    def take(self, num_bytes: int) -> bytes:
        if num_bytes > len(self.content) - self.place:
            raise _BrokenError(f"it ends at byte {len(self.content):,}, in the middle of its header")
        self.place += num_bytes
        return self.content[self.place - num_bytes : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")


_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


def _gguf(cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise _BrokenError("it does not begin with GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise _BrokenError(f"it is of version {version}; 2 and 3 can be read")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    if max(num_tensors, num_keys) > MAX_GGUF_ENTRIES:
        raise _BrokenError(f"it claims {num_tensors:,} tensors and {num_keys:,} keys")
    metadata = {cursor.text(): _value(cursor, cursor.number("I")) for _ in range(num_keys)}
    if not isinstance(metadata.get("general.architecture"), str):
        raise _BrokenError("it does not say its general.architecture")
    entries = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise _BrokenError(f"its alignment is {alignment!r}")
    data_bytes = len(cursor.content) - -(-cursor.place // alignment) * alignment
    for name, info, offset, num_bytes in entries:
        if offset + num_bytes > data_bytes:
            where = f"ends at byte {offset + num_bytes:,} of the data, which has {max(data_bytes, 0):,}"
            raise _BrokenError(f"tensor {name!r} of shape {list(info.shape)} {where}")
    return GgufHeader(metadata, {name: info for name, info, _, _ in entries})


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind])
    if kind == _TEXT:
        return cursor.text()
    if kind != _LIST:
        raise _BrokenError(f"a value of the unknown type {kind}")
    of, count = cursor.number("I"), cursor.number("Q")
    if of == _TEXT:
        for _ in range(count):  # ends with the file at the latest: each takes 8 bytes or more
            cursor.take(cursor.number("Q"))
        return count
    if of not in _NUMBERS:
        raise _BrokenError(f"a list of the type {of}")
    code = _NUMBERS[of]
    return list(struct.unpack(f"<{count}{code}", cursor.take(count * struct.calcsize("<" + code))))


def _entry(cursor: _Cursor) -> tuple[str, TensorInfo, int, int]:
    """Name, shape and type of a tensor, its offset in the data and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, num_dimensions = cursor.text(), cursor.number("I")
    if num_dimensions > MAX_DIMENSIONS:
        raise _BrokenError(f"tensor {name!r} has {num_dimensions} dimensions")
    # ggml writes the fastest dimension first, torch last
    shape = tuple(cursor.number("Q") for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind not in list(GGMLQuantizationType):
        raise _BrokenError(f"tensor {name!r} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not shape or shape[-1] % block:
        raise _BrokenError(f"tensor {name!r} of shape {list(shape)} cannot be cut into blocks of {block}")
    return name, TensorInfo(shape, GGMLQuantizationType(kind).name), offset, prod(shape) // block * block_bytes
