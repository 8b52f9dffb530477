"""Where an adapter loads besides peft, and with which flags; known before it is tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tunesmith.export.gguf_models import ARCHITECTURES
from tunesmith.export.source import Source

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank takes. Source: vLLM, config/lora.py."""
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "wpe")


def server_lines(source: Source, config: Mapping[str, Any]) -> Iterator[str]:
    """A line each for peft, vLLM and llama.cpp."""
    yield f"peft: yes{_whole(config)}."
    yield f"vLLM: {_vllm(source, config)}"
    yield f"llama.cpp: {_llama_cpp(source, config)}"


def _whole(config: Mapping[str, Any]) -> str:
    names = config.get("modules_to_save") or []
    return f"; it brings {', '.join(names)} whole" if names else ""


def _vllm(source: Source, config: Mapping[str, Any]) -> str:
    if why := not_for_vllm(source, config):
        return f"no: {why}. Export merged and serve that."
    limit = vllm_rank(config)
    base = config["base_model_name_or_path"]
    scaled = (
        " Old versions ignore use_rslora (vLLM #10798): for them use --bake-scale." if config.get("use_rslora") else ""
    )
    return f"yes: `vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules tuned=PATH`.{scaled}"


def _llama_cpp(source: Source, config: Mapping[str, Any]) -> str:
    if why := only_low_rank(source, config):
        return f"no: {why}. Export merged or gguf."
    if source.config.model_type not in ARCHITECTURES:
        return f"not known for a {source.config.model_type}. Export merged, and convert that."
    return (
        "not as it is: export gguf-adapter, then `llama-server -m base.gguf --lora adapter.gguf`; or gguf, adapter "
        "included."
    )


def vllm_rank(config: Mapping[str, Any]) -> int | None:
    """The least --max-lora-rank that an adapter fits under; None: it is larger than all."""
    return next((size for size in VLLM_RANKS if size >= int(config["r"])), None)


def not_for_vllm(source: Source, config: Mapping[str, Any]) -> str | None:
    """Why vLLM cannot put an adapter on its base; None: it can."""
    if config["peft_type"] != "LORA":
        return only_low_rank(source, config)
    if source.base.is_gguf:
        return "its base is a GGUF file, and adapters are put on the model folder that one was made from"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        return "its rank or alpha differs from layer to layer, of which one alone is read there"
    if vllm_rank(config) is None:
        return f"its rank is {config['r']}, and vLLM takes {VLLM_RANKS[-1]} at most"
    return only_low_rank(source, config)


def only_low_rank(source: Source, config: Mapping[str, Any]) -> str | None:
    """What of an adapter is more than low-rank paths beside the layers of a model that writes; None: nothing."""
    whole = ", ".join(config.get("modules_to_save") or ())
    unread = {
        f"it is {config['peft_type']}, of which only peft knows": config["peft_type"] != "LORA",
        "its weights are rescaled row by row (DoRA), which is not computed there": config.get("use_dora"),
        "it brings rows of the embedding (trainable_token_indices), which are not read there": config.get(
            "trainable_token_indices"
        ),
        f"it brings {whole} whole (modules_to_save), which is not read there": whole,
        "it brings biases, which are not read there": config.get("bias", "none") != "none",
    }
    if why := next((why for why, is_so in unread.items() if is_so), None):
        return why
    if source.head != "next_token" or source.kind != "causal":
        return f"it answers the task {source.recipe.task} on a model that is {source.kind.replace('_', '–')}"
    targets = config.get("target_modules") or []
    touched = [name for name in targets if name.rpartition(".")[2] in _EMBEDDINGS]
    return f"it adapts {', '.join(touched)}" if touched else None
