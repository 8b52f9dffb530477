"""`gguf`: one file for llama.cpp and programs built on it, with tokenizer and chat template."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import EIO, ENOSPC
from importlib.metadata import version
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tunesmith.environment.packages import install_command
from tunesmith.errors import ModelError
from tunesmith.export import llama_cpp
from tunesmith.export.gguf_models import ROPE_FACTORS, find_architecture, model_names, rope_factors
from tunesmith.export.gguf_tokenizer import add_vocabulary, find_vocabulary, read_tokenizer
from tunesmith.export.hub import base_id
from tunesmith.export.run_result import RunResult, tuned_tensors
from tunesmith.export.target import (
    FIVE_BITS,
    FOUR_BITS,
    GGUF_EXACT,
    QUANTIZED,
    ROUNDED,
    SIX_BITS,
    Computing,
    ExportOptions,
    ExportTarget,
    Tolerances,
    TorchModel,
)
from tunesmith.models import load
from tunesmith.models.gguf import GgufHeader, read_gguf
from tunesmith.models.load import pretrained_args, wrap_errors
from tunesmith.models.resolve_model import resolve_model
from tunesmith.recipe.schema import Recipe
from tunesmith.types import JsonObject

GgmlType: TypeAlias = gguf.GGMLQuantizationType
_File = gguf.LlamaFileType
_DISK_RESERVE = 1 << 20
"""Free bytes under which a disk counts as full: the last blocks can seldom be used."""


@dataclass(frozen=True, slots=True)
class QuantType:
    """One value of --quant."""

    ggml: GgmlType
    """Type of most matrices."""
    file: gguf.LlamaFileType
    tolerances: Tolerances
    by_llama_cpp: bool = False
    """Whether only llama.cpp's own quantizer makes it."""
    output: GgmlType | None = None
    """Type of the output layer, or of a tied embedding; None: as the others."""


QUANT_TYPES: dict[str, QuantType] = {
    "f32": QuantType(GgmlType.F32, _File.ALL_F32, GGUF_EXACT),
    "f16": QuantType(GgmlType.F16, _File.MOSTLY_F16, GGUF_EXACT),
    "bf16": QuantType(GgmlType.BF16, _File.MOSTLY_BF16, ROUNDED),
    "q8_0": QuantType(GgmlType.Q8_0, _File.MOSTLY_Q8_0, QUANTIZED),
    "q6_k": QuantType(GgmlType.Q6_K, _File.MOSTLY_Q6_K, SIX_BITS, by_llama_cpp=True),
    "q5_k_m": QuantType(GgmlType.Q5_K, _File.MOSTLY_Q5_K_M, FIVE_BITS, by_llama_cpp=True),
    "q5_k_s": QuantType(GgmlType.Q5_K, _File.MOSTLY_Q5_K_S, FIVE_BITS, by_llama_cpp=True),
    "q5_1": QuantType(GgmlType.Q5_1, _File.MOSTLY_Q5_1, FIVE_BITS, output=GgmlType.Q8_0),
    "q5_0": QuantType(GgmlType.Q5_0, _File.MOSTLY_Q5_0, FIVE_BITS, output=GgmlType.Q8_0),
    "q4_k_m": QuantType(GgmlType.Q4_K, _File.MOSTLY_Q4_K_M, FOUR_BITS, by_llama_cpp=True),
    "q4_k_s": QuantType(GgmlType.Q4_K, _File.MOSTLY_Q4_K_S, FOUR_BITS, by_llama_cpp=True),
    "q4_1": QuantType(GgmlType.Q4_1, _File.MOSTLY_Q4_1, FOUR_BITS, output=GgmlType.Q8_0),
    "q4_0": QuantType(GgmlType.Q4_0, _File.MOSTLY_Q4_0, FOUR_BITS, output=GgmlType.Q8_0),
}
"""By llama.cpp's name. The output layer of small types is finer than the rest, as in its own quantizer."""

QUANTIZER_INPUT = "f16"
"""Type of the file that llama.cpp's quantizer reads: its rounding is a hundredth of the quantizer's."""


def ggml_type(name: str, shape: tuple[int, ...], quant: QuantType, *, is_tied: bool) -> GgmlType:
    """Storage type of a tensor. Vectors are float32, as llama.cpp requires; rows of no whole blocks are F16."""
    if len(shape) < 2 or name == "position_embd.weight":  # llama.cpp's own quantizer leaves positions alone too
        return GgmlType.F32
    is_output = name == "output.weight" or (is_tied and name == "token_embd.weight")
    number = quant.output if is_output and quant.output is not None else quant.ggml
    return GgmlType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[number][0] else number


def quantized(tensor: Tensor, number: GgmlType) -> NDArray[Any]:
    blocks: NDArray[Any] = gguf.quantize(np.ascontiguousarray(tensor.detach().cpu().numpy()), number)
    return blocks


def file_stem(result: RunResult) -> str:
    """The run's name as start of a file name, safe on a command line and in a Modelfile."""
    return re.sub(r"[^\w.-]+", "-", result.run.path.name).strip("-.") or "run"


def file_name(result: RunResult, options: ExportOptions) -> str:
    return f"{file_stem(result)}-{options.quant}.gguf"


def check_model(result: RunResult, options: ExportOptions) -> list[str]:
    """Notes. Raises ModelError for a model, head or tokenizer that cannot be written."""
    if result.head != "next_token" or result.kind != "causal":
        raise ModelError(
            f"gguf: only decoder-only models that write text can be exported, and this model ({result.kind}) "
            f"is tuned for {result.recipe.task}. Export merged or onnx instead."
        )
    check_base(result.config, result.weights.name, options)
    find_vocabulary(result)
    if isinstance(result.tokenizer.chat_template, dict):
        raise ModelError("gguf: the tokenizer has several chat templates. Name the one of training in data.template.")
    return []


def check_base(config: PreTrainedConfig, name: str, options: ExportOptions) -> None:
    """Raise ModelError for an architecture that cannot be written, or a missing quantizer."""
    find_architecture(config, name)
    if QUANT_TYPES[options.quant].by_llama_cpp and not llama_cpp.is_installed():
        ours = ", ".join(name for name, quant in QUANT_TYPES.items() if not quant.by_llama_cpp)
        raise ModelError(
            f"--quant: {options.quant}: needs llama.cpp's quantizer, and llama-cpp-python is not installed. "
            f"Install it by `{install_command('llama-cpp')}`, or use one of {ours}."
        )


def write_model(result: RunResult, folder: Path, options: ExportOptions) -> list[str]:
    """Write the file. Returns notes."""
    model, attachment = result.load(result.stored_dtype)
    tensors = tuned_tensors(model, attachment)
    first = next(tensors)  # takes the adapter off, which leaves the plain model's names
    tensors = chain([first], tensors)
    path = folder / file_name(result, options)
    if not QUANT_TYPES[options.quant].by_llama_cpp:
        num_f16 = _write_file(path, result, options, model, tensors)
        return [f"{num_f16} matrices cannot be cut into blocks of 32 and are F16"] if num_f16 else []
    unquantized = path.with_name(f"{QUANTIZER_INPUT}-{path.name}")
    _write_file(unquantized, result, replace(options, quant=QUANTIZER_INPUT), model, tensors)
    del model, attachment, tensors, first  # the quantizer needs the memory
    file_type = int(QUANT_TYPES[options.quant].file)
    tick = result.on_progress
    llama_cpp.requantize(
        unquantized, path, file_type=file_type, threads=torch.get_num_threads(), tick=lambda: tick("quantize", 0, 1)
    )
    unquantized.unlink()
    return []


_ADD = {
    bool: gguf.GGUFWriter.add_bool, float: gguf.GGUFWriter.add_float32, int: gguf.GGUFWriter.add_uint32,
}  # fmt: skip


def _write_file(
    path: Path, result: RunResult, options: ExportOptions, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Write a model whose weights are `tensors`. Returns the number of matrices that became F16 instead."""
    config, quant = result.config, QUANT_TYPES[options.quant]
    architecture = find_architecture(config, result.weights.name)
    names = model_names(architecture, model)
    factors = rope_factors(model, config) if architecture.rope_factors else None
    layout: dict[str, tuple[tuple[int, ...], GgmlType]] = {}
    for name, weight in model.state_dict().items():
        if name in names:
            shape = tuple(weight.shape)[:: -1 if name.endswith(architecture.transposed) else 1]
            layout[name] = shape, ggml_type(names[name], shape, quant, is_tied="output.weight" not in names.values())
    with gguf_writer(path, result, options, architecture=architecture.name) as writer:
        for key, value in architecture.facts(config).items():
            _ADD[type(value)](writer, f"{architecture.name}.{key}", value)
        add_vocabulary(writer, find_vocabulary(result), result, num_rows=num_embeddings(model))
        float32 = np.dtype(np.float32)
        for name, (shape, number) in layout.items():
            block, block_bytes = gguf.GGML_QUANT_SIZES[number]
            writer.add_tensor_info(names[name], shape, float32, prod(shape) // block * block_bytes, raw_dtype=number)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, tuple(factors.shape), float32, factors.numel() * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        wanted = ((name, tensor) for name, tensor in tensors if name in names)
        for i, (name, tensor) in enumerate(wanted, start=1):
            stored = architecture.to_gguf(name, tensor.detach().float(), config)
            writer.write_tensor_data(quantized(stored, layout[name][1]))
            result.on_progress("write", i, len(layout))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    return sum(len(shape) > 1 and number == GgmlType.F16 != quant.ggml for shape, number in layout.values())


def num_embeddings(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


@contextmanager
def gguf_writer(
    path: Path, result: RunResult, options: ExportOptions, *, architecture: str
) -> Iterator[gguf.GGUFWriter]:
    """A writer with the general header keys, closed at the end."""
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        # Not the bare name: transformers takes a file named "mistral" for another architecture.
        writer.add_name(f"{result.run.path.name} ({result.recipe.task})")
        writer.add_file_type(QUANT_TYPES[options.quant].file)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if options.license is not None:
            writer.add_license(options.license)
        if (base := base_id(result)) is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
        yield writer
        writer.close()
        read_gguf(path)
    except (ModelError, OSError) as error:  # the last tensors may be lost silently when the file is closed
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # numpy reports how many numbers were written, but not why the rest were not.
        number = ENOSPC if shutil.disk_usage(path.parent).free < _DISK_RESERVE else EIO
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        writer.close()


_HEADER_TO_CONFIG = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Header keys that transformers' reader leaves out of the config."""


def load_model(folder: Path, recipe: Recipe, computing: Computing) -> TorchModel:
    """The model of a GGUF, dequantized."""
    path = next(folder.glob("*.gguf"))
    located = resolve_model(str(path), offline=True)
    header = read_gguf(path)
    config = load.load_config(located)
    _complete(config, header)
    with wrap_errors(located, "its weights cannot be loaded"):
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            **pretrained_args(located), config=config, dtype=computing.dtype, output_loading_info=True
        )
    if loading_info["missing_keys"]:
        raise ModelError(f"{path.name}: {len(loading_info['missing_keys'])} weights are missing")
    if ROPE_FACTORS in header.tensors:
        stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == ROPE_FACTORS)
        factors = gguf.dequantize(stored.data, stored.tensor_type).copy()
        model.base_model.rotary_emb.inv_freq.div_(torch.from_numpy(factors))
    by = f"transformers {version('transformers')}"
    return TorchModel(read_tokenizer(located), "causal", "next_token", by, model.to(computing.device))


def _complete(config: PreTrainedConfig, header: GgufHeader) -> None:
    name = header.architecture
    for key, attribute in _HEADER_TO_CONFIG.items():
        if hasattr(config, attribute):
            setattr(config, attribute, header.metadata.get(f"{name}.{key}"))
    if name == "gpt2":
        config.n_positions = header.metadata["gpt2.context_length"]
    if name in ("gemma2", "gemma3"):
        config.query_pre_attn_scalar = header.metadata[f"{name}.attention.key_length"]


def _card(result: RunResult, folder: Path, options: ExportOptions) -> JsonObject:
    name = file_name(result, options)
    use = [("sh", f"llama-server -m {name} --jinja"), ("sh", f"llama-cli -m {name} --jinja")]
    return {"library": "gguf", "relation": "quantized", "use": use}


GGUF = ExportTarget(
    name="gguf",
    doc="One file for llama.cpp and all programs built on it.",
    check=check_model,
    write=write_model,
    load=load_model,
    tolerances=lambda result, options: QUANT_TYPES[options.quant].tolerances,
    card=_card,
    reads=("quant",),
    quants=tuple(QUANT_TYPES),
    check_base=check_base,
)
