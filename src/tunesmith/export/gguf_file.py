"""`gguf`: one file for llama.cpp and all that is built on it, with tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.export.card import base_id
from tunesmith.export.gguf_models import REPACKED, Architecture, find_architecture, model_names, rope_factors
from tunesmith.export.gguf_vocabulary import add_vocabulary, find_vocabulary
from tunesmith.export.options import GGUF_EXACT, QUANTIZED, ROUNDED, Bounds, Export, Options
from tunesmith.export.source import Source, tuned_tensors
from tunesmith.models import load
from tunesmith.models.size import size

KINDS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_F32, _F16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16


def file_name(source: Source, options: Options) -> str:
    return f"{source.run.path.name}-{options.quant}.gguf"


def check(source: Source, options: Options) -> list[str]:
    """What to say before; raises ModelError for a model, a head or a tokenizer that cannot go into a GGUF."""
    if source.head != "next_token" or source.kind != "causal":
        raise ModelError(
            f"gguf: only models that go on with a text can be written here, and this one is tuned for "
            f"{source.recipe.task}. Export merged instead."
        )
    find_architecture(source.config, source.weights.name)
    rule = find_vocabulary(source, options.pre).rule
    notes = [f"text is split by llama.cpp's rule {rule.name}: {rule.how}"]
    if isinstance(source.tokenizer.chat_template, dict):
        raise ModelError(
            "gguf: the tokenizer has several chat templates. Give the one it was tuned with by data.template."
        )
    return notes


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write the file; what to say of it."""
    model, attachment = source.load(source.stored_dtype)
    tensors = tuned_tensors(model, attachment)
    first = next(tensors)  # takes the adapter off, so that names are those of the plain model
    fallen = _write_file(folder / file_name(source, options), source, options, model, chain([first], tensors))
    return [f"{fallen} matrices cannot be cut into blocks of 32 and are F16"] if fallen else []


def write_base(source: Source, path: Path) -> Path:
    """The untouched base of an adapter in float32, for llama.cpp to put the adapter on."""
    model = load.load_model(source.base, dtype=torch.float32, device="cpu", head="next_token")
    _write_file(path, source, Options(quant="f32"), model, model.state_dict().items())
    return path


def _write_file(
    path: Path, source: Source, options: Options, model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """A model whose weights are `tensors`; how many matrices fell back to F16."""
    config = source.config
    architecture = find_architecture(config, source.weights.name)
    factors = rope_factors(model, config) if architecture.rope_factors else None
    names = model_names(architecture, model)
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        _add_facts(writer, source, architecture, options)
        add_vocabulary(writer, find_vocabulary(source, options.pre), source, num_rows=_num_rows(model))
        fallen = _announce(writer, model, names, architecture, options)
        if factors is not None:
            writer.add_tensor_info(REPACKED, tuple(factors.shape), np.dtype(np.float32), factors.numel() * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            if name in names:
                fitted = architecture.fitted(name, tensor.detach().float(), config).numpy()
                writer.write_tensor_data(packed(fitted, _kind(fitted.shape, options)))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    finally:
        writer.close()
    return fallen


def _num_rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _add_facts(writer: gguf.GGUFWriter, source: Source, architecture: Architecture, options: Options) -> None:
    writer.add_type("model")
    # Not a bare word: transformers takes a file whose name is just "mistral" for another architecture.
    writer.add_name(f"{source.run.path.name} ({source.recipe.task})")
    writer.add_file_type(KINDS[options.quant][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if options.license is not None:
        writer.add_license(options.license)
    if (base := base_id(source)) is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    for key, value in architecture.facts(source.config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture.name}.{key}", value)


def _announce(
    writer: gguf.GGUFWriter, model: PreTrainedModel, names: dict[str, str], architecture: Architecture, options: Options
) -> int:
    """Name every tensor with its shape and kind, in the order they will be written; how many matrices fell back."""
    fallen = 0
    for name, weight in model.state_dict().items():
        if name not in names:
            continue
        shape = architecture.shape(name, tuple(weight.shape))
        kind = _kind(shape, options)
        fallen += len(shape) > 1 and kind != KINDS[options.quant][0]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            names[name], shape, np.dtype(np.float32), prod(shape) // block * block_bytes, raw_dtype=kind
        )  # fmt: skip
    return fallen


def _kind(shape: tuple[int, ...], options: Options) -> gguf.GGMLQuantizationType:
    """Vectors stay float32, as llama.cpp wants them."""
    if len(shape) < 2:
        return _F32
    kind = KINDS[options.quant][0]
    return _F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def packed(tensor: NDArray[np.float32], kind: gguf.GGMLQuantizationType) -> NDArray[Any]:
    """Numbers as the file stores them."""
    packed: NDArray[Any] = gguf.quantize(np.ascontiguousarray(tensor), kind)
    return packed


def num_bytes(source: Source, options: Options) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[KINDS[options.quant][0]]
    return int(size(source.weights).num_params * block_bytes // block)


def bounds(source: Source, options: Options) -> Bounds:
    return {"q8_0": QUANTIZED, "bf16": ROUNDED}.get(options.quant, GGUF_EXACT)


def rounds_less(options: Options) -> str:
    """The option that rounds less."""
    return {"q8_0": "--quant f16", "bf16": "--quant f16", "f16": "--quant f32"}.get(options.quant, "")


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    name = file_name(source, options)
    use = [("sh", f"llama-server -m {name} --jinja"), ("sh", f"llama-cli -m {name} --jinja")]
    smaller = (
        "Smaller kinds need llama.cpp's own quantiser, and nobody has then compared the result: "
        f"`llama-quantize {name} {source.run.path.name}-q4_k_m.gguf q4_k_m` (best from f32, f16 or bf16)."
    )
    return {"library": "gguf", "relation": "quantized", "use": use, "servers": smaller}


GGUF = Export(
    name="gguf",
    doc="One file for llama.cpp and all that is built on it.",
    check=check,
    write=write,
    num_bytes=num_bytes,
    bounds=bounds,
    loader="gguf",
    rounds_less=rounds_less,
    card=_card,
    reads=("quant", "pre", "merge_into"),
)
