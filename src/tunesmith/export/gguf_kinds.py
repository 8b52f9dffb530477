"""How the matrices of a GGUF are stored: which quantiser makes each kind, and how far it may be from what was tuned."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
from numpy.typing import NDArray

from tunesmith.environment import install_command
from tunesmith.errors import ModelError
from tunesmith.export.llama_cpp_read import is_installed
from tunesmith.export.options import FIVE_BITS, FOUR_BITS, GGUF_EXACT, QUANTIZED, ROUNDED, SIX_BITS, Bounds
from tunesmith.models.gguf import read_gguf

Number: TypeAlias = gguf.GGMLQuantizationType
_File = gguf.LlamaFileType
_OUTPUT, _EMBEDDING = "output.weight", "token_embd.weight"
_ADDED = ("position_embd.weight", "token_types.weight", "cls.output.weight")
"""Small, and added to or read as they are: llama.cpp's own quantiser leaves the first two alone as well."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One word of --quant."""

    number: Number
    """Of most matrices."""
    file: gguf.LlamaFileType
    bounds: Bounds
    finer: str
    """The word for what rounds less."""
    by_llama_cpp: bool = False
    """Whether only llama.cpp's own quantiser makes it."""
    output: Number | None = None
    """Of the output layer, and of an embedding that is one too; None: as the others."""


KINDS: dict[str, Kind] = {
    "f32": Kind(Number.F32, _File.ALL_F32, GGUF_EXACT, ""),
    "f16": Kind(Number.F16, _File.MOSTLY_F16, GGUF_EXACT, "f32"),
    "bf16": Kind(Number.BF16, _File.MOSTLY_BF16, ROUNDED, "f16"),
    "q8_0": Kind(Number.Q8_0, _File.MOSTLY_Q8_0, QUANTIZED, "f16"),
    "q6_k": Kind(Number.Q6_K, _File.MOSTLY_Q6_K, SIX_BITS, "q8_0", by_llama_cpp=True),
    "q5_k_m": Kind(Number.Q5_K, _File.MOSTLY_Q5_K_M, FIVE_BITS, "q6_k", by_llama_cpp=True),
    "q5_k_s": Kind(Number.Q5_K, _File.MOSTLY_Q5_K_S, FIVE_BITS, "q6_k", by_llama_cpp=True),
    "q5_1": Kind(Number.Q5_1, _File.MOSTLY_Q5_1, FIVE_BITS, "q8_0", output=Number.Q8_0),
    "q5_0": Kind(Number.Q5_0, _File.MOSTLY_Q5_0, FIVE_BITS, "q8_0", output=Number.Q8_0),
    "q4_k_m": Kind(Number.Q4_K, _File.MOSTLY_Q4_K_M, FOUR_BITS, "q5_k_m", by_llama_cpp=True),
    "q4_k_s": Kind(Number.Q4_K, _File.MOSTLY_Q4_K_S, FOUR_BITS, "q5_k_m", by_llama_cpp=True),
    "q4_1": Kind(Number.Q4_1, _File.MOSTLY_Q4_1, FOUR_BITS, "q8_0", output=Number.Q8_0),
    "q4_0": Kind(Number.Q4_0, _File.MOSTLY_Q4_0, FOUR_BITS, "q8_0", output=Number.Q8_0),
}
"""By the name in llama.cpp. The output layer of small kinds is finer than the rest, as its own quantiser makes it."""

BASE_OF_QUANTISER = "f16"
"""What llama.cpp's quantiser is given: rounding to it is a hundredth of what follows."""


def number_of(name: str, shape: tuple[int, ...], kind: Kind, *, is_tied: bool) -> Number:
    """How the tensor `name` of llama.cpp is stored. Vectors stay float32, as llama.cpp wants them; what cannot be cut
    into blocks is F16."""
    if len(shape) < 2 or name in _ADDED:
        return Number.F32
    is_output = name == _OUTPUT or (is_tied and name == _EMBEDDING)
    number = kind.output if is_output and kind.output is not None else kind.number
    return Number.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[number][0] else number


def stored_bytes(shape: tuple[int, ...], number: Number) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    return int(prod(shape) // block * block_bytes)


def packed(tensor: NDArray[np.float32], number: Number) -> NDArray[Any]:
    """Numbers as the file stores them."""
    packed: NDArray[Any] = gguf.quantize(np.ascontiguousarray(tensor), number)
    return packed


def check_quantiser(quant: str) -> None:
    """Raises ModelError, with the ways out, where llama.cpp is needed for a kind and is not there."""
    if KINDS[quant].by_llama_cpp and not is_installed():
        ours = ", ".join(name for name, kind in KINDS.items() if not kind.by_llama_cpp)
        raise ModelError(
            f"--quant: {quant}: llama.cpp's own quantiser makes it, and llama-cpp-python is not installed. "
            f"`{install_command('llama-cpp')}` brings it; without it there are {ours}."
        )


def rows_of_no_blocks(path: Path) -> str:
    """Which matrices of a K kind could not be cut into blocks of 256 and what they are instead; empty where none."""
    tensors = read_gguf(path).tensors.items()
    odd = {name: info for name, info in tensors if len(info.shape) > 1 and info.shape[-1] % 256}
    if not odd:
        return ""
    kinds = Counter(info.dtype for info in odd.values())
    said = ", ".join(f"{num} {kind}" for kind, num in sorted(kinds.items()))
    ends = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in odd}))
    return f"{len(odd)} matrices cannot be cut into blocks of 256 and are of larger kinds ({said}): {ends}"
