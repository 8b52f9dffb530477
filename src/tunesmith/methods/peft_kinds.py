"""The methods of the peft library by name: which there are, their settings checked, and which are refused and why."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from tunesmith.environment import install_command
from tunesmith.errors import RecipeError
from tunesmith.models.quantized import import_bitsandbytes
from tunesmith.recipe.methods import PeftMethod

OWN_KEYS = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
)  # fmt: skip
"""Settings that follow from the model and the run."""
NUM_VIRTUAL = 20
"""Virtual tokens where none are asked for: what Lester et al. 2021 find enough for most models (section 4)."""

REFUSED: Mapping[str, str] = types.MappingProxyType(
    {
        "ADAPTION_PROMPT": "it replaces attention by code for older models. Use kind PREFIX_TUNING.",
        "CPT": "it has a loss of its own over the tokens of its prompt. Use kind PROMPT_TUNING.",
        "MULTITASK_PROMPT_TUNING": "it needs the number of a task with every row. Use kind PROMPT_TUNING.",
        "POLY": "it needs the number of a task with every row. Use kind LORA.",
        "SHADOW": "it trains a second model beside the first, with a loss of its own. Use kind LORA.",
        "XLORA": "it mixes adapters that were trained before. Use kind LORA.",
    }
)
"""Kinds that cannot be trained here, by name, and why."""


READ: Mapping[str, frozenset[str]] = types.MappingProxyType(
    {
        "ADALORA": frozenset(
            {
                "bias", "beta1", "beta2", "deltaT", "exclude_modules", "fan_in_fan_out", "init_r", "layers_pattern",
                "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "orth_reg_weight",
                "target_modules", "target_r", "tfinal", "tinit", "total_step",
            }
        ),
    }
)  # fmt: skip
"""Of kinds whose dataclass has the settings of another kind too: those that they read."""

RATES: Mapping[str, tuple[float, str]] = types.MappingProxyType(
    {
        "IA3": (3e-3, "Liu et al. 2022, section 3.4"),
        "LN_TUNING": (1e-3, "few numbers, each of which has far to go"),
        "PREFIX_TUNING": (1e-2, "peft's example"),
        "PROMPT_TUNING": (3e-2, "peft's example"),
        "P_TUNING": (1e-3, "peft's example"),
        "VERA": (4e-3, "Kopiczko et al. 2023, table 7"),
    }
)
"""Rates of kinds that learn at others than LoRA, with AdamW, and where that is said."""

MERGES = frozenset(
    {
        "ADALORA", "ADAMSS", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA",
        "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA",
        "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
"""Kinds that are a change of weights, which `merge_and_unload` puts into the model's own."""


def import_peft() -> Any:
    """The library. Raises RecipeError where it is not installed."""
    if find_spec("peft") is None:
        raise RecipeError(
            "method.name: peft needs the package peft, which is not installed. "
            f"Install it with: {install_command('peft')}, or use method.name: lora."
        )
    if find_spec("bitsandbytes") is not None:
        import_bitsandbytes()
    import peft

    return peft


def is_prompt(kind: str) -> bool:
    """Whether a kind puts virtual tokens before each row."""
    return issubclass(_config_class(kind), import_peft().PromptLearningConfig)


def learning_rate(method: PeftMethod, kind: str, num_parameters: int) -> tuple[float, str]:
    """The usual peak rate with AdamW, and why."""
    if method.kind in RATES:
        rate, source = RATES[method.kind]
        return rate, f"usual for {method.kind}: {source}"
    return 5e-4 if num_parameters < 1e9 else 2e-4, f"that of LoRA: for {method.kind} none is known here, try others too"


def num_virtual_tokens(settings: PeftMethod) -> int:
    """Positions of each row that a method takes for itself; 0 for all but prompts."""
    if not is_prompt(settings.kind):
        return 0
    return int(settings.settings["num_virtual_tokens"])


def what_draws(method: PeftMethod) -> str | None:
    """What of a method is random in training; None: nothing is."""
    if method.kind == "PVERA":
        return "PVERA"
    drop = (key for key, value in method.settings.items() if "dropout" in key and value)
    return next((f"method.settings.{key}" for key in drop), None)


def resolved(method: PeftMethod) -> PeftMethod:
    """The method with its settings checked against peft's own dataclass, and the number of virtual tokens decided.

    Raises:
        RecipeError: peft is not installed, has no such kind, or one that cannot be trained here; settings that it does
            not know, or of another type.
    """
    config = _config_class(method.kind)
    fields = {field.name for field in dataclasses.fields(config)} - set(OWN_KEYS)
    known = fields & READ.get(method.kind, fields)
    problems = [_unknown(key, method.kind, known) for key in method.settings if key not in known]
    hints = typing.get_type_hints(config)
    for key in known & method.settings.keys():
        problems += _misfit(key, method.settings[key], hints[key])
    if problems:
        raise RecipeError("\n".join(problems))
    settings = dict(method.settings)
    if is_prompt(method.kind) and settings.get("num_virtual_tokens") is None:
        settings["num_virtual_tokens"] = NUM_VIRTUAL
    return method.model_copy(update={"settings": settings})


def make_config(method: PeftMethod, **given: Any) -> Any:
    """peft's config of a checked method. Raises RecipeError for settings that it refuses itself."""
    try:
        return _config_class(method.kind)(**method.settings, **given)
    except Exception as error:  # each config has checks of its own, and errors of its own
        raise RecipeError(f"method.settings: {method.kind}: peft refuses them: {error}") from error


def _config_class(kind: str) -> Any:
    import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(found.value): config for found, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind in REFUSED:
        raise RecipeError(f"method.kind: {kind}: {REFUSED[kind]}")
    if kind not in kinds:
        near = difflib.get_close_matches(kind, kinds, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        there = ", ".join(sorted(kinds.keys() - REFUSED.keys()))
        raise RecipeError(f"method.kind: {kind!r}: peft has no such method.{meant} There are: {there}.")
    return kinds[kind]


def _unknown(key: str, kind: str, known: set[str]) -> str:
    if key in OWN_KEYS:
        return f"method.settings.{key}: follows from the model and the run. Leave it out."
    near = difflib.get_close_matches(key, known, n=1)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"method.settings.{key}: {kind} has no such setting.{meant} There are: {', '.join(sorted(known))}."


def _misfit(key: str, value: Any, hint: Any) -> list[str]:
    """What is wrong with a value by the type that peft declares."""
    if isinstance(value, Mapping) and "trust_remote_code" in value:
        return [f"method.settings.{key}: trust_remote_code: code of a model is not run here. Leave it out."]
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError):
        return []  # a type that only peft can check, which it does when the config is made
    except ValidationError as error:
        return [f"method.settings.{key}: {value!r}: {error.errors()[0]['msg']}."]
    return []
