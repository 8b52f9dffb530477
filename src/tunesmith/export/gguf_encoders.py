"""Encoders in a GGUF: llama.cpp computes the vector of a text of them, and what a head over its first token says.

Source: llama.cpp, conversion/bert.py, src/models/bert.cpp, build_pooling of src/llama-graph.cpp. Every token is given
the type 0 there, and the activation is GELU by tanh. A classifier is output(tanh(dense(first token))): BERT's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.export.gguf_models import Architecture, Facts, sizes, tensor_names
from tunesmith.export.gguf_unpack import tensors
from tunesmith.export.rows import find_probes
from tunesmith.export.source import Source
from tunesmith.models.gguf import GgufHeader
from tunesmith.models.pooling import PoolingKind, find_pooling

_POOLINGS: dict[PoolingKind, gguf.PoolingType] = {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS}
_HEAD = {"bert.pooler.dense": "cls", "classifier": "cls.output"}
"""llama.cpp's names of what stands on an encoder."""


def _bert(config: Any) -> Facts:
    return {
        **sizes(config),
        "feed_forward_length": config.intermediate_size,
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "attention.causal": False,
    }


def _of_bert(config: Any) -> list[str]:
    odd = config.hidden_act not in ("gelu", "gelu_new", "gelu_pytorch_tanh")
    return [f"its activation is {config.hidden_act}"] if odd else []


ENCODERS = {"bert": Architecture("bert", _bert, _of_bert)}
"""By transformers' model_type. Shown equal by reading them back, and in llama.cpp."""


def check_encoder(source: Source) -> list[str]:
    """What to say before; raises ModelError for what llama.cpp does not compute of encoders."""
    name = source.weights.name
    if source.config.model_type not in ENCODERS:
        raise ModelError(
            f"{name}: gguf: a {source.config.model_type} cannot be written here, and read back as a proof. Of encoders "
            f"that can: {', '.join(ENCODERS)}. Export merged or onnx."
        )
    if limits := ENCODERS[source.config.model_type].limits(source.config):
        raise ModelError(f"{name}: gguf: llama.cpp would compute another model: {'; '.join(limits)}. Export merged.")
    if source.head == "tokens":
        raise ModelError(f"{name}: gguf: llama.cpp has no head that answers word by word. Export merged or onnx.")
    if any(part.role == "text_pair" for row in find_probes(source).examples for part in row.parts):
        raise ModelError(
            f"{name}: gguf: llama.cpp gives every token the type 0, and in pairs of texts the second has the type 1. "
            "Export merged or onnx."
        )
    if source.head == "sequence":
        return ["answers come as llama.cpp's pooling type rank: raw scores, in the order of the classes in the header"]
    kind = find_pooling(source.weights.path).kind
    if kind not in _POOLINGS:
        raise ModelError(f"{name}: gguf: llama.cpp does not pool by {kind}, as the model's files ask. Export merged.")
    return [
        f"its vectors of texts go along, pooled by {kind}; its head for masked words stays behind: llama.cpp has none"
    ]


def add_reading(writer: gguf.GGUFWriter, source: Source) -> None:
    """Write how a text becomes a vector, or the classes."""
    writer.add_token_type_count(source.config.type_vocab_size)
    if source.head == "sequence":
        writer.add_pooling_type(gguf.PoolingType.RANK)
        if source.labels is not None and source.labels.names:
            writer.add_classifier_output_labels(source.labels.names)
    else:
        writer.add_pooling_type(_POOLINGS[find_pooling(source.weights.path).kind])


def encoder_names(architecture: Architecture, model: PreTrainedModel) -> dict[str, str]:
    """llama.cpp's name of each weight that is written: all but a head for masked words."""
    head, body = {}, {}
    for name in model.state_dict():
        layer, _, end = name.rpartition(".")
        if layer in _HEAD:
            head[name] = f"{_HEAD[layer]}.{end}"
        elif name.startswith(f"{model.base_model_prefix}."):
            body[name.partition(".")[2]] = name
    theirs = tensor_names(architecture, list(body), model.config.num_hidden_layers)
    return {body[name]: other for name, other in theirs.items()} | head


def pooling_of(header: GgufHeader) -> PoolingKind | None:
    """How the file pools; None: it has a head that answers with classes."""
    number = header.metadata[f"{header.architecture}.pooling_type"]
    return next((kind for kind, other in _POOLINGS.items() if other == number), None)


@torch.no_grad()
def unpack_encoder(path: Path, header: GgufHeader, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a file as llama.cpp computes it. Raises ModelError for a weight that is missing, or one too many."""
    facts, name = header.metadata, header.architecture
    found = dict(tensors(path))
    config = AutoConfig.for_model(
        name,
        vocab_size=facts["tokenizer.ggml.tokens"],
        num_hidden_layers=facts[f"{name}.block_count"],
        max_position_embeddings=facts[f"{name}.context_length"],
        hidden_size=facts[f"{name}.embedding_length"],
        intermediate_size=facts[f"{name}.feed_forward_length"],
        num_attention_heads=facts[f"{name}.attention.head_count"],
        layer_norm_eps=facts[f"{name}.attention.layer_norm_epsilon"],
        type_vocab_size=facts["tokenizer.ggml.token_type_count"],
        hidden_act="gelu_pytorch_tanh",
        num_labels=facts.get(f"{name}.classifier.output_labels", 1),
    )
    auto = AutoModelForMaskedLM if pooling_of(header) else AutoModelForSequenceClassification
    model: PreTrainedModel = auto.from_config(config, dtype=dtype).eval()
    weights = model.state_dict()
    for ours, theirs in encoder_names(ENCODERS[name], model).items():
        if theirs not in found:
            raise ModelError(f"{path.name}: {theirs} is missing")
        weights[ours].copy_(found.pop(theirs))
    if found:
        raise ModelError(f"{path.name}: {len(found)} tensors are no weights of it, such as {next(iter(found))}")
    return model
