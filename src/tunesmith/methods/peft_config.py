"""adapter_config.json of the peft library: what our adapters say there, and what others' say read back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.methods.lora import Adapted, LoraAttachment
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.methods.patterns import CONFIG, fits, fits_end
from tunesmith.methods.targets import Target, layer_of
from tunesmith.methods.whole import tied_modules
from tunesmith.models import heads
from tunesmith.recipe.methods import DoraMethod, LoraMethod, LowRankMethod

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights alone."""
_READ = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
"""Keys of adapter_config.json that are understood, or say nothing about what the adapter computes."""


def to_config(attachment: LoraAttachment, *, base: str, revision: str | None) -> dict[str, Any]:
    """What adapter_config.json says of an adapter.

    One that takes its start off again stands there as what it is on the untouched base: plain LoRA of twice the rank.
    """
    settings, rows = attachment.settings, attachment.rows
    twice = any(layer.start is not None for layer in attachment.layers.values())
    is_stable = settings.rslora and not twice
    ranks = {name: one.rank * (2 if twice else 1) for name, one in attachment.sizes.items()}
    alphas = {
        name: one.alpha if is_stable or not twice else attachment.layers[name].scale * ranks[name]
        for name, one in attachment.sizes.items()
    }
    rank = settings.rank * (2 if twice else 1)
    alpha = settings.alpha
    if twice:
        alpha = rank * settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(attachment.model),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": _whole_number(alpha),
        "lora_dropout": settings.dropout,
        "target_modules": shortest_ends(attachment.layers, module_names(attachment.model)),
        "fan_in_fan_out": any(layer.lies_transposed for layer in attachment.layers.values()),
        "bias": settings.bias,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": is_stable,
        "use_dora": isinstance(settings, DoraMethod),
        "modules_to_save": whole_modules(attachment) or None,
        "trainable_token_indices": None if rows is None else {name: list(rows.ids) for name in rows.names},
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {f"^{name}": other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {f"^{name}": _whole_number(other) for name, other in alphas.items() if other != alpha},
    }


def planned_config(settings: LowRankMethod) -> dict[str, Any]:
    """The main entries of adapter_config.json of an adapter that is not trained yet."""
    return {
        "peft_type": "LORA",
        "r": settings.rank,
        "use_dora": isinstance(settings, DoraMethod),
        "use_rslora": settings.rslora,
        "bias": settings.bias,
        "modules_to_save": list(settings.also_train),
        "target_modules": list(settings.targets),
    }


def _whole_number(value: float) -> float:
    return int(value) if value == int(value) else value


def _task_type(model: PreTrainedModel) -> str | None:
    """What peft wraps the base for; it knows no name for models that guess masked tokens."""
    names = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "masked_token": None}
    return names.get(heads.head_of(model), "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")


def whole_modules(attachment: LoraAttachment) -> list[str]:
    """The modules that an adapter brings whole: those of the head, which stand beside the base model, with the pooler
    inside it, and those that were named, with what shares their weights."""
    inside, pooler = f"{attachment.model.base_model_prefix}.", ".pooler"
    of_head = (
        name[: name.index(pooler) + len(pooler)] if name.startswith(inside) else name.partition(".")[0]
        for name in attachment.head
    )
    modules = attachment.whole.modules
    return list(dict.fromkeys([*of_head, *modules, *tied_modules(attachment.model, modules)]))


def shortest_ends(chosen: Mapping[str, object], all_names: Sequence[str]) -> list[str]:
    """The shortest name endings that mean the `chosen` modules and no other of `all_names`, as peft reads them."""
    ends = set()
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - 1, -1, -1):
            end = ".".join(parts[start:])
            if all(other in chosen for other in all_names if other == end or other.endswith("." + end)):
                ends.add(end)
                break
    return sorted(ends)


def module_names(model: nn.Module) -> list[str]:
    """Names of the modules as they are without adapters."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLinear))
    return [name for name, _ in model.named_modules() if not (inside and name.startswith(inside))]


@dataclass(frozen=True, slots=True)
class Saved:
    """An adapter's config, understood."""

    settings: LowRankMethod
    config: Mapping[str, Any]

    @property
    def base(self) -> str:
        return str(self.config["base_model_name_or_path"])

    def token_rows(self) -> dict[str, list[int]]:
        """The tokens whose rows an adapter brings, by module; a mere list is of the embedding, under no name."""
        indices = self.config.get("trainable_token_indices") or {}
        return dict(indices) if isinstance(indices, dict) else {"": list(indices)}

    def means(self, name: str) -> bool:
        """Whether the module of this name is adapted."""

        def listed(words: str | Sequence[str] | None) -> bool:
            if isinstance(words, str):
                return fits(words, name)
            return any(name == word or name.endswith("." + word) for word in words or ())

        layers = self.config.get("layers_to_transform")
        if layers is not None:
            place = layer_of(name)
            if place is None or place[1] not in ([layers] if isinstance(layers, int) else layers):
                return False
        return listed(self.config["target_modules"]) and not listed(self.config.get("exclude_modules"))

    def sized(self, target: Target) -> Adapted:
        """The size of a layer's adapter, by the first of the patterns that means it."""
        rank = by_patterns(self.config.get("rank_pattern") or {}, target.name, self.settings.rank)
        return Adapted(
            target, rank, by_patterns(self.config.get("alpha_pattern") or {}, target.name, self.settings.alpha)
        )


def by_patterns(patterns: Mapping[str, Any], name: str, default: float) -> Any:
    """The value of the first pattern that means a layer, as peft reads them."""
    return next((value for key, value in patterns.items() if fits_end(key, name)), default)


def read_config(folder: Path) -> Saved:
    """The config of an adapter. Raises ModelError for one that is damaged or says what is not understood."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: missing: the folder of an adapter holds {CONFIG} and adapter_model.safetensors"
        ) from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return Saved(_settings(path, config), config)


def _settings(path: Path, config: dict[str, Any]) -> LowRankMethod:
    missing = [key for key in ("r", "lora_alpha", "target_modules", "base_model_name_or_path") if key not in config]
    if config.get("peft_type") != "LORA" or missing:
        raise ModelError(f"{path}: not a LoRA adapter: peft_type {config.get('peft_type')!r}, missing keys {missing}")
    extras = sorted(key for key, value in config.items() if value and key not in _READ)
    if config.get("layers_pattern") and config.get("layers_to_transform") is not None:
        extras.append("layers_pattern")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        extras.append("init_lora_weights")
    if extras:
        raise ModelError(
            f"{path}: {', '.join(extras)}: only LoRA and DoRA that leave the base as it is can be loaded. Merge this "
            "adapter with peft."
        )
    kind = DoraMethod if config.get("use_dora") else LoraMethod
    targets = config["target_modules"]
    try:
        words = (f"re:^(?:{re.compile(targets).pattern})$",) if isinstance(targets, str) else tuple(sorted(targets))
        for pattern in (*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())):
            re.compile(pattern)
        return kind(
            rank=config["r"],
            alpha=config["lora_alpha"],
            rslora=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout", 0.0),
            targets=words,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            bias=config.get("bias", "none"),
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {first['loc'][0]}: {first['msg']}") from error
    except (TypeError, re.error) as error:
        raise ModelError(f"{path}: target_modules: {error}") from error
