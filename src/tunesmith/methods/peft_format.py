"""Adapters on disk, in the format of the peft library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError
from tunesmith.files import remove, replace_folder, storing, temporary_folder
from tunesmith.methods.lora import LoraAttachment, LoraLinear, wrap
from tunesmith.methods.targets import named_targets, shared_weights
from tunesmith.models import heads, padding
from tunesmith.models.save import save_tokenizer
from tunesmith.recipe.knobs import LoraMethod

if TYPE_CHECKING:
    from tunesmith.data.render import Renderer
    from tunesmith.models.locate import Located

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<name>.+)\.(?P<matrix>lora_[AB])\.weight")
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model's weights alone."""
_READ = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
"""Keys of adapter_config.json that are understood, or say nothing about what the adapter computes."""


def save_adapter(
    attachment: LoraAttachment,
    folder: Path,
    *,
    base: str,
    revision: str | None = None,
    add: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write `folder` as a whole or not at all; weights float32, whatever the model computes in.

    `add` is given the folder before it takes its place, for what shall stand beside the adapter.
    """
    beside = temporary_folder(folder.parent, folder.name)
    try:
        tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in attachment.trained.items()}
        weights = save(tensors, metadata={"format": "pt"})
        config = json.dumps(_config(attachment, base=base, revision=revision), indent=2, sort_keys=True) + "\n"
        with storing(folder, num_bytes=len(weights) + len(config)):
            (beside / WEIGHTS).write_bytes(weights)
            (beside / CONFIG).write_text(config, encoding="utf-8")
            add(beside)
        replace_folder(beside, folder, swap=True)
    except BaseException:
        remove(beside)
        raise


def save_result(
    attachment: LoraAttachment, folder: Path, *, model: PreTrainedModel, renderer: Renderer, located: Located
) -> None:
    """The adapter, the labels of a head, and the tokenizer with the template it was trained with; other settings stay
    those of the base.

    The base goes down as its hub id and commit, or as the whole path of a folder or file.
    """
    base = located.name if located.kind == "hub" else str(located.path.resolve())

    def add(folder: Path) -> None:
        save_tokenizer(padding.fitted(model, renderer.tokenizer), folder, located=located)
        heads.write_labels(model, folder)

    save_adapter(attachment, folder, base=base, revision=located.revision, add=add)


def load_adapter(model: PreTrainedModel, folder: Path) -> LoraAttachment:
    """Put a saved adapter on `model`, its base: one of ours or a plain LoRA written by peft.

    Raises:
        ModelError: a file that is missing or broken, a kind of adapter that is not plain LoRA, other labels, or weights
            that are not exactly those of the layers it names and of the model's head; the model was not changed.
    """
    heads.check_labels(model, folder)
    config = _read_config(folder)
    settings = _settings(folder, config)
    tensors = _read_weights(folder)
    names = {match["name"] for key in tensors if (match := _KEY.fullmatch(key))}
    expected = {name for name in _module_names(model) if _peft_means(config, name)}
    targets = named_targets(model, sorted(expected | names))
    fit = {name for target in targets for name in target.names}
    problems = [f"no linear layer {name} in the model" for name in sorted((expected | names) - fit)]
    problems += [f"no weights for {name}" for name in sorted(expected - names)]
    problems += [f"weights for {name}, which target_modules does not name" for name in sorted(names - expected)]
    head = _saved_whole(config, model)
    problems += [f"unknown tensor {key}" for key in sorted(tensors) if not _KEY.fullmatch(key) and key not in head]
    problems += _head_misfits(model, head, tensors)
    problems += shared_weights(model, targets)
    for target in targets:
        problems += _misfits(target.name, target.module, tensors, rank=settings.rank)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{folder}: does not fit {config['base_model_name_or_path']}: {'; '.join(problems[:5])}{more}")
    attachment = wrap(model, targets, head=head, settings=settings)
    with torch.no_grad():
        for name, master in attachment.trained.items():
            master.copy_(tensors[name])
    attachment.publish()
    return attachment


def _config(attachment: LoraAttachment, *, base: str, revision: str | None) -> dict[str, Any]:
    settings = attachment.settings
    alpha = int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha
    return {
        "peft_type": "LORA",
        "task_type": _task_type(attachment.model),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "target_modules": shortest_ends(attachment.layers, _module_names(attachment.model)),
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in attachment.layers.values()),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": _whole_modules(attachment) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _task_type(model: PreTrainedModel) -> str | None:
    """What peft wraps the base for; it knows no name for models that guess masked tokens."""
    names = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "masked_token": None}
    return names.get(heads.head_of(model), "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")


def _whole_modules(attachment: LoraAttachment) -> list[str]:
    """The modules that hold the head: those beside the base model, and the pooler inside it."""
    inside, pooler = f"{attachment.model.base_model_prefix}.", ".pooler"
    names = (
        name[: name.index(pooler) + len(pooler)] if name.startswith(inside) else name.partition(".")[0]
        for name in attachment.head
    )
    return list(dict.fromkeys(names))


def _saved_whole(config: Mapping[str, Any], model: nn.Module) -> list[str]:
    """The weights of the modules that an adapter brings whole, as peft finds them: by the ends of their names."""
    ends = tuple(config.get("modules_to_save") or ())
    whole = tuple(f"{name}." for name, _ in model.named_modules() if ends and name.endswith(ends))
    return [name for name, _ in model.named_parameters() if whole and name.startswith(whole)]


def _head_misfits(model: nn.Module, head: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    known = heads.new_head_names(model)
    drawn = heads.drawn_names(model)
    problems = [f"{name} comes whole, but is no part of a head" for name in head if name not in known]
    needed = [name for name in known if name in drawn or not name.startswith(f"{model.base_model_prefix}.")]
    problems += [f"no weights for the head's {name}" for name in needed if name not in head]
    for name in head:
        shape = tuple(model.get_parameter(name).shape)
        if name not in tensors:
            problems.append(f"no weights for the head's {name}")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    return problems


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


def _module_names(model: nn.Module) -> list[str]:
    """Names of the modules as they are without adapters."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLinear))
    return [name for name, _ in model.named_modules() if not (inside and name.startswith(inside))]


def _peft_means(config: Mapping[str, Any], name: str) -> bool:
    def listed(words: str | Sequence[str] | None) -> bool:
        if isinstance(words, str):
            return re.fullmatch(words, name) is not None
        return any(name == word or name.endswith("." + word) for word in words or ())

    return listed(config["target_modules"]) and not listed(config.get("exclude_modules"))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing: the folder of an adapter holds {CONFIG} and {WEIGHTS}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return config


def _settings(folder: Path, config: dict[str, Any]) -> LoraMethod:
    """The settings that give the same scale; rank-stabilized scaling (alpha / √rank) becomes a larger alpha."""
    path = folder / CONFIG
    missing = [key for key in ("r", "lora_alpha", "target_modules", "base_model_name_or_path") if key not in config]
    if config.get("peft_type") != "LORA" or missing:
        raise ModelError(f"{path}: not a LoRA adapter: peft_type {config.get('peft_type')!r}, missing keys {missing}")
    extras = sorted(key for key, value in config.items() if value and key not in _READ)
    extras += [key for key in ("rank_pattern", "alpha_pattern") if config.get(key) and key not in extras]
    if config.get("bias", "none") != "none":
        extras.append("bias")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        extras.append("init_lora_weights")
    if extras:
        raise ModelError(f"{path}: {', '.join(extras)}: only plain LoRA can be loaded. Merge this adapter with peft.")
    targets = config["target_modules"]
    try:
        words = (f"re:^(?:{re.compile(targets).pattern})$",) if isinstance(targets, str) else tuple(sorted(targets))
        settings = LoraMethod(
            rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0), targets=words
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {first['loc'][0]}: {first['msg']}") from error
    except (TypeError, re.error) as error:
        raise ModelError(f"{path}: target_modules: {error}") from error
    if config.get("use_rslora"):
        return settings.model_copy(update={"alpha": settings.alpha * settings.rank**0.5})
    return settings


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors by name of the layer, e.g. `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    path = folder / WEIGHTS
    if not path.exists():
        raise ModelError(f"{path}: missing. Weights in .bin files are not read: save the adapter as safetensors.")
    try:
        return {key.removeprefix(_PREFIX): tensor for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _misfits(name: str, module: nn.Module, tensors: Mapping[str, Tensor], *, rank: int) -> list[str]:
    weight: Tensor = module.weight  # type: ignore[assignment]
    num_outputs, num_inputs = weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape
    problems = []
    for matrix, shape in (("lora_A", (rank, num_inputs)), ("lora_B", (num_outputs, rank))):
        tensor = tensors.get(f"{name}.{matrix}.weight")
        if tensor is None:
            problems.append(f"no {name}.{matrix}.weight")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name}.{matrix}.weight has shape {tuple(tensor.shape)}, expected {shape}")
    return problems
