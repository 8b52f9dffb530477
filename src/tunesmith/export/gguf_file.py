"""`gguf`: one file for llama.cpp and all that is built on it, with tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.export.asked import Asks
from tunesmith.export.gguf_encoders import ENCODERS, add_reading, check_encoder, encoder_names
from tunesmith.export.gguf_header import file_stem, gguf_writer
from tunesmith.export.gguf_kinds import (
    BASE_OF_QUANTISER,
    KINDS,
    Number,
    check_quantiser,
    number_of,
    packed,
    rows_of_no_blocks,
    stored_bytes,
)
from tunesmith.export.gguf_models import REPACKED, Architecture, find_architecture, model_names, rope_factors
from tunesmith.export.gguf_unpack import UNKNOWN_TO_TRANSFORMERS
from tunesmith.export.gguf_vocabulary import add_vocabulary, find_vocabulary
from tunesmith.export.llama_cpp_read import is_installed
from tunesmith.export.options import Bounds, Export, Options
from tunesmith.export.quantiser import requantize
from tunesmith.export.source import Source, tuned_tensors
from tunesmith.models import load
from tunesmith.models.size import model_size


def file_name(source: Source, options: Options) -> str:
    return f"{file_stem(source)}-{options.quant}.gguf"


def check(source: Source, options: Options) -> list[str]:
    """What to say before; raises ModelError for a model, a head or a tokenizer that cannot go into a GGUF."""
    if source.kind == "encoder":
        notes = check_encoder(source)
    elif source.head != "next_token" or source.kind != "causal":
        raise ModelError(
            f"gguf: encoders and models that go on with a text can be written here, and this one, which is "
            f"{source.kind.replace('_', '–')}, is tuned for {source.recipe.task}. Export merged instead."
        )
    else:
        find_architecture(source.config, source.weights.name)
        notes = []
    check_quantiser(options.quant)
    rule = find_vocabulary(source, options.pre).rule
    notes.append(f"llama.cpp splits text by its rule {rule.name}: {rule.how}")
    if isinstance(source.tokenizer.chat_template, dict):
        raise ModelError(
            "gguf: the tokenizer has several chat templates. Give the one it was tuned with by data.template."
        )
    if source.config.model_type in (*UNKNOWN_TO_TRANSFORMERS, *ENCODERS) and not is_installed():
        notes.append(
            f"transformers reads no GGUF of a {source.config.model_type}, and llama-cpp-python is not installed: "
            "tunesmith alone reads it back, and would not see names or an order of rows that llama.cpp takes for others"
        )
    return notes


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Write the file; what to say of it."""
    model, attachment = source.load(source.stored_dtype)
    tensors = tuned_tensors(model, attachment)
    first = next(tensors)  # takes the adapter off, so that names are those of the plain model
    path = folder / file_name(source, options)
    if not KINDS[options.quant].by_llama_cpp:
        fallen = _write_file(path, source, options, model, chain([first], tensors))
        return [f"{fallen} matrices cannot be cut into blocks of 32 and are F16"] if fallen else []
    whole = path.with_name(f"{BASE_OF_QUANTISER}-{path.name}")
    _write_file(whole, source, replace(options, quant=BASE_OF_QUANTISER), model, chain([first], tensors))
    del model, attachment, tensors, first  # the quantiser needs the memory
    requantize(whole, path, file_type=int(KINDS[options.quant].file), threads=torch.get_num_threads())
    whole.unlink()
    return [said] if (said := rows_of_no_blocks(path)) else []


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
    if source.kind == "encoder":
        architecture = ENCODERS[config.model_type]
        names = encoder_names(architecture, model)
    else:
        architecture = find_architecture(config, source.weights.name)
        names = model_names(architecture, model)
    factors = rope_factors(model, config) if architecture.rope_factors else None
    numbers = _numbers(model, names, architecture, options)
    with gguf_writer(path, source, options, architecture=architecture.name, kind=gguf.GGUFType.MODEL) as writer:
        for key, value in architecture.facts(config).items():
            _ADD[type(value)](writer, f"{architecture.name}.{key}", value)
        if source.kind == "encoder":
            add_reading(writer, source)
        add_vocabulary(writer, find_vocabulary(source, options.pre), source, num_rows=_num_rows(model))
        for name, (shape, number) in numbers.items():
            writer.add_tensor_info(
                names[name], shape, np.dtype(np.float32), stored_bytes(shape, number), raw_dtype=number
            )  # fmt: skip
        if factors is not None:
            writer.add_tensor_info(REPACKED, tuple(factors.shape), np.dtype(np.float32), factors.numel() * 4)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            if name in names:
                fitted = architecture.fitted(name, tensor.detach().float(), config).numpy()
                writer.write_tensor_data(packed(fitted, numbers[name][1]))
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
    asked = KINDS[options.quant].number
    return sum(len(shape) > 1 and number == Number.F16 != asked for shape, number in numbers.values())


_ADD = {
    bool: gguf.GGUFWriter.add_bool, float: gguf.GGUFWriter.add_float32, int: gguf.GGUFWriter.add_uint32,
}  # fmt: skip


def _num_rows(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _numbers(
    model: PreTrainedModel, names: dict[str, str], architecture: Architecture, options: Options
) -> dict[str, tuple[tuple[int, ...], Number]]:
    """The shape of each weight that is written and how it is stored, in the order they are written."""
    kind, is_tied = KINDS[options.quant], "output.weight" not in names.values()
    found = {}
    for name, weight in model.state_dict().items():
        if name in names:
            shape = architecture.shape(name, tuple(weight.shape))
            found[name] = shape, number_of(names[name], shape, kind, is_tied=is_tied)
    return found


def num_bytes(source: Source, options: Options) -> int:
    """Of the file; where llama.cpp's quantiser makes it, of what that reads too."""
    kind, num_params = KINDS[options.quant], model_size(source.weights).num_params
    if not kind.by_llama_cpp:
        return stored_bytes((num_params,), kind.number)
    # At most 8 bits: rows that make no blocks of 256 are stored in larger kinds.
    return stored_bytes((num_params,), KINDS[BASE_OF_QUANTISER].number) + stored_bytes((num_params,), Number.Q8_0)


def bounds(source: Source, options: Options) -> Bounds:
    return KINDS[options.quant].bounds


def rounds_less(options: Options) -> str:
    """The option that rounds less."""
    finer = KINDS[options.quant].finer
    return f"--quant {finer}" if finer else ""


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    name = file_name(source, options)
    fields = {"library": "gguf", "relation": "quantized"}
    if source.head == "next_token":
        use = [f"llama-server -m {name} --jinja", f"llama-cli -m {name} --jinja"]
    elif source.head == "sequence":
        use = [f'llama-embedding -m {name} -p "a text"  # a raw score for each class']
    else:
        use = [f"llama-server -m {name} --embeddings  # vectors of length 1 at /v1/embeddings"]
        fields["pipeline"] = "feature-extraction"
    return {**fields, "use": [("sh", line) for line in use]}


def asks(source: Source) -> Asks:
    """What llama.cpp computes of it."""
    return "vector" if source.head == "masked_token" else source.head


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
    quants=tuple(KINDS),
    asks=asks,
)
