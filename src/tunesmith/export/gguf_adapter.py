"""`gguf-adapter`: the adapter alone as a GGUF, which llama.cpp puts on any GGUF of the same base.

    W x + alpha / rank · B (A x)

Its tensors are `<weight>.lora_a` [R, I] and `<weight>.lora_b` [O, R], with the weight's name in llama.cpp.

Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

# O outputs, I inputs, R rank

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gguf
from torch import Tensor

from tunesmith.errors import ModelError, RunError
from tunesmith.export.adapter import BASE_FILE, write_base_facts
from tunesmith.export.gguf_header import file_stem, gguf_writer
from tunesmith.export.gguf_kinds import KINDS, packed
from tunesmith.export.gguf_models import find_architecture, tensor_names
from tunesmith.export.gguf_read import TEMPLATE
from tunesmith.export.options import Export, Options
from tunesmith.export.servers import only_low_rank
from tunesmith.export.source import Source
from tunesmith.methods.lora import LoraAttachment
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.methods.peft_format import WEIGHTS

QUANTS = ("f32", "f16", "bf16")


def file_name(source: Source, options: Options) -> str:
    return f"{file_stem(source)}-lora-{options.quant}.gguf"


def _check(source: Source, options: Options) -> list[str]:
    if not source.is_adapter:
        raise RunError(f"{source.run.path}: every weight was tuned, so there is no adapter. Use --to gguf.")
    if why := only_low_rank(source, source.adapter_config):
        raise ModelError(f"gguf-adapter: llama.cpp reads low-rank paths alone, and this adapter is more: {why}.")
    architecture = find_architecture(source.config, source.weights.name)
    tensor_names(architecture, [f"{name}.weight" for name in source.adapted], source.config.num_hidden_layers)
    notes = []
    if not source.base.is_gguf:
        notes.append("it needs a GGUF of the base beside it, which is not written here: the card says how to make one")
    return notes


def _write(source: Source, folder: Path, options: Options) -> list[str]:
    attachment = cast(LoraAttachment, source.load(source.stored_dtype)[1])  # `check` refuses other methods
    architecture = find_architecture(source.config, source.weights.name)
    names = tensor_names(
        architecture, [f"{name}.weight" for name in attachment.layers], source.config.num_hidden_layers
    )
    alpha = _alpha(attachment)
    path = folder / file_name(source, options)
    with gguf_writer(path, source, options, architecture=architecture.name, kind=gguf.GGUFType.ADAPTER) as writer:
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, layer in attachment.layers.items():
            a_RI, b_OR = attachment.matrices(name)
            b_OR = architecture.fitted_b(f"{name}.weight", _fitted(b_OR, layer, a_RI.shape[0], alpha), source.config)
            for end, matrix in ((".lora_a", a_RI), (".lora_b", b_OR)):
                number = KINDS[options.quant].number
                array = packed(matrix.detach().cpu().numpy(), number)
                writer.add_tensor(names[f"{name}.weight"] + end, array, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    if isinstance(source.tokenizer.chat_template, str):
        (folder / TEMPLATE).write_text(source.tokenizer.chat_template, encoding="utf-8", newline="")
    write_base_facts(source, folder)
    return []


def _alpha(attachment: LoraAttachment) -> float:
    """That of the first layer: scale = alpha / rank. Where all are alike it is the alpha of the recipe."""
    name, layer = next(iter(attachment.layers.items()))
    return float(layer.scale * attachment.matrices(name)[0].shape[0])


def _fitted(b_OR: Tensor, layer: LoraLinear, rank: int, alpha: float) -> Tensor:
    """There is one alpha for all: what a layer scales by beyond alpha / rank goes into its B."""
    return b_OR * (layer.scale * rank / alpha)


def _num_bytes(source: Source, options: Options) -> int:
    return (source.result / WEIGHTS).stat().st_size


def _card(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    name = file_name(source, options)
    base = source.base.path.name if source.base.is_gguf else "base.gguf"
    template = f" --chat-template-file {TEMPLATE}" if (folder / TEMPLATE).is_file() else ""
    whose = f"`{base}`, whose SHA-256 is in {BASE_FILE}"
    if not source.base.is_gguf:
        whose = f"a GGUF of the base, by `python convert_hf_to_gguf.py BASE --outfile {base}` of llama.cpp"
    return {
        "library": "gguf",
        "relation": "adapter",
        "use": [("sh", f"llama-server -m {base} --lora {name} --jinja{template}")],
        "servers": f"It was compared on weights as they were tuned, and goes on {whose}. On a base in smaller kinds of "
        "numbers it works too, and nobody has then compared the result.",
    }


GGUF_ADAPTER = Export(
    name="gguf-adapter",
    doc="The adapter alone, for llama.cpp to put on a GGUF of its base.",
    check=_check,
    write=_write,
    num_bytes=_num_bytes,
    bounds=lambda source, options: KINDS[options.quant].bounds,
    loader="gguf-adapter",
    rounds_less=lambda options: "" if options.quant == "f32" else "--quant f32",
    card=_card,
    reads=("quant",),
    quants=QUANTS,
)
