"""LoRA and DoRA adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.methods import expert_format
from tunesmith.methods.expert_lora import ExpertLora
from tunesmith.methods.lora import MAGNITUDE, Adapted, LoraAttachment, Whole, put_adapters
from tunesmith.methods.lora_layer import LoraLinear
from tunesmith.methods.new_token_embeddings import ROWS_SUFFIX, tables
from tunesmith.methods.targets import (
    Target,
    check_expression,
    expert_targets,
    is_inside,
    matches,
    named_targets,
    shape_OI,
    tied_modules,
    tied_reasons,
)
from tunesmith.models import heads
from tunesmith.models.pooling import write_pooling
from tunesmith.models.quantized_experts import QuantizedExperts
from tunesmith.models.save import save_tokenizer
from tunesmith.models.special_tokens import with_pad_token
from tunesmith.recipe.methods import DoraMethod, LoraMethod, LowRankMethod
from tunesmith.runs.atomic import writing_folder
from tunesmith.types import JsonObject, Record

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.models.resolve_model import ModelRef

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""peft's prefix of the names of the model's own weights."""
PATTERN_KEYS = (
    "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save",
)  # fmt: skip
"""Keys of a config that peft reads as regular expressions."""
MOST_NAMED_TENSORS = 5
"""Problems of an adapter that an error names."""

_LAYER_KEY = re.compile(r"(?P<name>.+)\.(?:lora_[AB]\.weight|lora_magnitude_vector)")
_LAYER_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the weights of the base as they are."""
_READ = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices",
    "use_dora", "use_rslora",
}  # fmt: skip
"""Keys of a config that are read here, or do not change what the adapter computes."""


# Writing


def save_result(
    attachment: LoraAttachment, folder: Path, *, model: PreTrainedModel, renderer: Renderer, located: ModelRef
) -> None:
    """Write the adapter, in float32 whatever the model computes in, the labels of a head, and the tokenizer
    with the template that it was trained with."""
    config = to_config(attachment, base=base_reference(located), revision=located.revision)
    num_bytes = _num_bytes(attachment)
    with writing_adapter(folder, num_bytes, model=model, renderer=renderer, located=located) as staged:
        _write(attachment, config, staged)


@contextmanager
def writing_adapter(
    folder: Path, num_bytes: int, *, model: PreTrainedModel, renderer: Renderer, located: ModelRef
) -> Iterator[Path]:
    """Give a folder to write an adapter into; at the end it gets tokenizer and labels, and takes the place of
    `folder`. After an exception nothing remains."""
    with writing_folder(folder, num_bytes=num_bytes) as staged:
        yield staged
        save_tokenizer(with_pad_token(model, renderer.tokenizer), staged, located=located)
        heads.write_labels(model, staged)
        if renderer.pooling is not None:
            write_pooling(renderer.pooling, staged, size=model.config.get_text_config().hidden_size)


def base_reference(located: ModelRef) -> str:
    """The base of an adapter: its hub id, or the whole path of a folder or file."""
    return located.name if located.kind == "hub" else str(located.path.resolve())


def to_config(attachment: LoraAttachment, *, base: str, revision: str | None) -> JsonObject:
    """The adapter_config.json of an adapter."""
    settings, rows, sizes = attachment.settings, attachment.rows, attachment.sizes
    model, modules = attachment.model, attachment.whole.modules
    written_whole = [*head_modules(model, attachment.whole.head), *modules, *tied_modules(model, modules)]
    linears = {name: layer for name, layer in attachment.layers.items() if isinstance(layer, LoraLinear)}
    products = [target.name for target in expert_targets(model)]
    adapted_products = dict.fromkeys(_products(attachment))
    of_experts = {"target_parameters": shortest_ends(adapted_products, products, least=2)}
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base,
        "revision": revision,
        "r": settings.rank,
        "lora_alpha": _as_int(settings.alpha),
        "lora_dropout": settings.dropout,
        "target_modules": shortest_ends(linears, module_names(model)),
        "fan_in_fan_out": any(layer.is_transposed for layer in linears.values()),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": settings.rslora,
        "use_dora": isinstance(settings, DoraMethod),
        "modules_to_save": list(dict.fromkeys(written_whole)) or None,
        "trainable_token_indices": None if rows is None else {name: list(rows.ids) for name in rows.names},
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {f"^{name}": size.rank for name, size in sizes.items() if size.rank != settings.rank},
        "alpha_pattern": {
            f"^{name}": _as_int(size.alpha) for name, size in sizes.items() if size.alpha != settings.alpha
        },
        **(of_experts if adapted_products else {}),
    }


def _products(attachment: LoraAttachment) -> list[str]:
    """The adapted products of experts, in the order of the model."""
    return [name for name, layer in attachment.layers.items() if isinstance(layer, ExpertLora)]


def task_type(model: PreTrainedModel) -> str | None:
    """peft's name of the model's task; it has none for models that guess masked tokens."""
    names = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "masked_token": None, "vector": "FEATURE_EXTRACTION"}
    return names.get(heads.head_of(model), "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")


def head_modules(model: PreTrainedModel, weights: Sequence[str]) -> list[str]:
    """The modules of a head: those outside of the base model, and the pooler inside it."""
    inside, pooler = f"{model.base_model_prefix}.", ".pooler"
    names = (
        name[: name.index(pooler) + len(pooler)] if name.startswith(inside) else name.partition(".")[0]
        for name in weights
    )
    return list(dict.fromkeys(names))


def shortest_ends(chosen: Mapping[str, object], all_names: Sequence[str], *, least: int = 1) -> list[str]:
    """The shortest ends of names, of at least `least` parts, that mean the `chosen` modules and no other of
    `all_names`, as in peft."""
    ends = set()
    for name in chosen:
        parts = name.split(".")
        for start in range(len(parts) - least, -1, -1):
            end = ".".join(parts[start:])
            if all(other in chosen for other in all_names if other == end or other.endswith("." + end)):
                ends.add(end)
                break
    return sorted(ends)


def module_names(model: nn.Module) -> list[str]:
    """Names of the modules as they are without adapters, and with experts as the tensors that they are."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, (LoraLinear, ExpertLora)))
    modules = [(name, module) for name, module in model.named_modules() if not (inside and name.startswith(inside))]
    return [name for name, module in modules if not isinstance(module, (ExpertLora, QuantizedExperts))]


def check_patterns(config: Record) -> None:
    """Raise ModelError for a config with a regular expression on which peft could take forever."""
    for key in PATTERN_KEYS:
        words = config.get(key) or ()
        for word in [words] if isinstance(words, str) else words:
            check_expression(word)


def _as_int(value: float) -> float:
    return int(value) if value == int(value) else value


def _num_bytes(attachment: LoraAttachment) -> int:
    return sum(4 * tensor.numel() for tensor in attachment.trained.values())


def _write(attachment: LoraAttachment, config: Record, folder: Path) -> None:
    by_name = _tensors(attachment).items()
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in by_name}
    (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def _tensors(attachment: LoraAttachment) -> dict[str, Tensor]:
    """Everything that is trained, by its names in the file."""
    tensors = dict(attachment.trained)
    masters = {id(weight): attachment.trained[name] for name, weight in attachment.weights.items()}
    for name, weight in _saved_modules(attachment.model, attachment.whole.modules).items():
        tensors[name] = masters[id(weight)].clone()  # tied ones are there twice, and safetensors wants no sharing
    return expert_format.to_file(tensors, _products(attachment))


def _saved_modules(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of `modules` under every name that a file needs: tied ones under each."""
    return {
        f"{module}.{name}": parameter
        for module in (*modules, *tied_modules(model, modules))
        for name, parameter in model.get_submodule(module).named_parameters()
    }


# Reading


@dataclass(frozen=True, slots=True)
class SavedConfig:
    """An adapter's config."""

    settings: LowRankMethod
    config: Record

    def means(self, name: str) -> bool:
        """Whether the module of this name is adapted."""

        def is_listed(words: str | Sequence[str] | None) -> bool:
            if isinstance(words, str):
                return matches(words, name, whole=True)
            return any(_is_end(word, name) for word in words or ())

        layers = self.config.get("layers_to_transform")
        if layers is not None:
            number = _LAYER_NUMBER.search(name)
            if number is None or int(number[1]) not in ([layers] if isinstance(layers, int) else layers):
                return False
        return is_listed(self.config["target_modules"]) and not is_listed(self.config.get("exclude_modules"))

    def means_tensor(self, name: str) -> bool:
        """Whether the tensor of this name is adapted."""
        return any(_is_end(word, name) for word in self.tensor_words)

    @property
    def tensor_words(self) -> Sequence[str]:
        """Ends of the names of tensors that are adapted, as experts are."""
        return self.config.get("target_parameters") or ()

    def sized(self, target: Target) -> Adapted:
        """A layer with the rank and alpha of its adapter."""
        rank = by_patterns(self.config.get("rank_pattern") or {}, target.name, self.settings.rank)
        alpha = by_patterns(self.config.get("alpha_pattern") or {}, target.name, self.settings.alpha)
        return Adapted(target, rank, alpha)

    def token_ids(self) -> set[tuple[int, ...]]:
        """The tokens whose rows the adapter brings, as listed for each module; empty: none."""
        indices = self.config.get("trainable_token_indices") or {}
        return {tuple(ids) for ids in (indices.values() if isinstance(indices, dict) else [indices]) if ids}


def _is_end(word: str, name: str) -> bool:
    return name == word or name.endswith(f".{word}")


def by_patterns(patterns: Record, name: str, default: float) -> Any:
    """The value of the first pattern that means a layer, as peft reads them."""
    parts = name.split(".")
    ends = [".".join(parts[start:]) for start in range(len(parts))]
    values = (value for key, value in patterns.items() if any(matches(key, end, whole=True) for end in ends))
    return next(values, default)


def load_adapter(model: PreTrainedModel, folder: Path) -> LoraAttachment:
    """Put a saved adapter on `model`, its base: one of ours, or a LoRA or DoRA written by peft.

    Raises:
        ModelError: a file that is missing or broken, a kind of adapter that changes the base, other labels, or
            weights that do not fit exactly the layers it names and the model's head; the model was not changed.
    """
    heads.check_labels(model, folder)
    saved = read_config(folder)
    experts = [target for target in expert_targets(model) if saved.means_tensor(target.name)]
    tensors = expert_format.named_by_product(_read_weights(folder), [target.name for target in experts])
    named = {match["name"] for key in tensors if (match := _LAYER_KEY.fullmatch(key))}
    meant = {name for name in module_names(model) if saved.means(name)} | {target.name for target in experts}
    targets = [*named_targets(model, named | meant), *experts]
    linear = {name for target in targets for name in target.names}
    adapted = [saved.sized(target) for target in targets]
    whole_weights = _find_whole(saved, model)
    ids = saved.token_ids()
    problems = [f"no linear layer {name} in the model" for name in sorted((named | meant) - linear)]
    problems += [f"weights for {name}, which target_modules does not name" for name in sorted(named - meant)]
    problems += [f"{name} is adapted and whole" for name in sorted(linear) if is_inside(name, whole_weights.modules)]
    problems += tied_reasons(model, targets)
    problems += [
        f"target_parameters: {word} is no tensor of experts that adapters here can follow"
        for word in saved.tensor_words
        if not any(_is_end(word, target.name) for target in experts)
    ]
    if len(ids) > 1:
        problems.append("rows of embedding and head are for different tokens")
    num_rows = min(len(weight) for weight in tables(model).values()) if ids else 0
    problems += [
        f"rows for token {max(ids_of_table)}, and the model has {num_rows}: its embedding has to grow first"
        for ids_of_table in ids
        if max(ids_of_table) >= num_rows
    ]
    rows = next(iter(ids), ())
    problems += tensor_problems(tensors, _shapes(saved, model, adapted, whole_weights, rows))
    problems += _unequal_ties(model, whole_weights, tensors)
    # A pooler that comes with the base may be missing, the rest of a head may not.
    drawn, inside = heads.new_param_names(model), f"{model.base_model_prefix}."
    needed = [name for name in heads.new_head_names(model) if name in drawn or not name.startswith(inside)]
    problems += [f"no weights for the head's {name}" for name in needed if name not in whole_weights.head]
    if problems:
        more = f" and {len(problems) - MOST_NAMED_TENSORS} more" if len(problems) > MOST_NAMED_TENSORS else ""
        base = saved.config["base_model_name_or_path"]
        raise ModelError(f"{folder}: does not fit {base}: {'; '.join(problems[:MOST_NAMED_TENSORS])}{more}")
    attachment = put_adapters(model, adapted, whole=whole_weights, settings=saved.settings, rows=rows)
    with torch.no_grad():
        for name, master in attachment.trained.items():
            master.copy_(expert_format.from_file(name, tensors[name], master))
    attachment.publish()
    return attachment


def read_low_rank(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A [R, I], B [O, R] and the scale of their product for each layer of a saved adapter, by the layer's name.

    Raises ModelError for one that is damaged, or more than low-rank paths.
    """
    saved, tensors = read_config(folder), _read_weights(folder)
    if isinstance(saved.settings, DoraMethod):
        raise ModelError(f"{folder}: DoRA, which is more than low-rank paths on layers")
    if saved.tensor_words:
        raise ModelError(f"{folder}: target_parameters: adapters on experts cannot share a base")
    paths: dict[str, tuple[Tensor, Tensor, float]] = {}
    for key, a_RI in tensors.items():
        match = _LAYER_KEY.fullmatch(key)
        if match is None or f"{match['name']}.lora_B.weight" not in tensors:
            raise ModelError(f"{folder}: {key} is more than a low-rank path on a layer")
        if key.endswith("lora_A.weight"):
            name, rank = match["name"], len(a_RI)
            alpha = by_patterns(saved.config.get("alpha_pattern") or {}, name, saved.settings.alpha)
            scale = alpha / (rank**0.5 if saved.settings.rslora else rank)
            paths[name] = (a_RI, tensors[f"{name}.lora_B.weight"], scale)
    return paths


def read_config(folder: Path) -> SavedConfig:
    """The config of an adapter. Raises ModelError for one that is damaged or holds what is not understood."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing: the folder of an adapter holds {CONFIG} and {WEIGHTS}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: not a JSON object")
    return SavedConfig(_settings(path, config), config)


def _settings(path: Path, config: JsonObject) -> LowRankMethod:
    needed = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")
    missing = [key for key in needed if key not in config]
    if config.get("peft_type") != "LORA" or missing:
        raise ModelError(f"{path}: not a LoRA adapter: peft_type {config.get('peft_type')!r}, missing keys {missing}")
    unknown = sorted(key for key, value in config.items() if value and key not in _READ)
    if config.get("layers_pattern") and config.get("layers_to_transform") is not None:
        unknown.append("layers_pattern")
    if config.get("init_lora_weights", True) not in _KEEPS_BASE:
        unknown.append("init_lora_weights")
    if config.get("bias", "none") != "none":
        unknown.append("bias")
    if config.get("target_parameters"):
        unknown += [key for key in ("use_dora", "lora_dropout") if config.get(key)]  # which peft refuses there
    if unknown:
        raise ModelError(
            f"{path}: {', '.join(unknown)}: only LoRA and DoRA that leave the base as it is can be loaded. "
            "Merge this adapter with peft."
        )
    targets, place = config["target_modules"], "target_modules"
    if targets is None and config.get("target_parameters"):
        targets = []
    try:
        is_pattern = isinstance(targets, str)
        words = (f"re:^(?:{re.compile(targets).pattern})$",) if is_pattern else tuple(sorted(targets))
        place = "target_parameters"
        if isinstance(config.get(place), str):
            raise TypeError("a list of names, not one name")
        words += tuple(sorted(config.get(place) or ()))
        for place in ("rank_pattern", "alpha_pattern"):
            for pattern in config.get(place) or ():
                re.compile(pattern)
        return (DoraMethod if config.get("use_dora") else LoraMethod)(
            rank=config["r"],
            alpha=config["lora_alpha"],
            rslora=bool(config.get("use_rslora")),
            dropout=config.get("lora_dropout", 0.0),
            targets=words,
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {first['loc'][0]}: {first['msg']}") from error
    except (TypeError, re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"{path}: {place}: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors by names such as `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    path = folder / WEIGHTS
    if not path.exists():
        raise ModelError(f"{path}: missing. Weights in .bin files are not read: save the adapter as safetensors.")
    try:
        return {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error


def _find_whole(saved: SavedConfig, model: PreTrainedModel) -> Whole:
    """Weights that an adapter brings whole, as peft finds them: modules by name endings."""
    ends = tuple(saved.config.get("modules_to_save") or ())
    matching = [name for name, _ in model.named_modules() if ends and name.endswith(ends)]
    head = tuple(name for name in heads.new_head_names(model) if is_inside(name, matching))
    modules = [name for name in matching if not any(is_inside(weight, [name]) for weight in head)]
    once: list[str] = []
    for name in modules:
        if not is_inside(name, set(modules) - {name}) and not tied_modules(model, [name]).keys() & set(once):
            once.append(name)
    return Whole(head, tuple(once))


def _shapes(
    saved: SavedConfig, model: PreTrainedModel, adapted: Sequence[Adapted], whole: Whole, rows: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of everything that the file must hold, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in adapted:
        if layer.target.is_of_experts:
            module: Any = layer.target.module
            shapes |= expert_format.shapes_in_file(layer.target.name, module.shape_EOI, layer.rank)
            continue
        name, (num_outputs, num_inputs) = layer.target.name, shape_OI(layer.target.module)
        shapes |= {
            f"{name}.lora_A.weight": (layer.rank, num_inputs),
            f"{name}.lora_B.weight": (num_outputs, layer.rank),
        }
        if isinstance(saved.settings, DoraMethod):
            shapes[f"{name}.{MAGNITUDE}"] = (num_outputs,)
    shapes |= {name: tuple(weight.shape) for name, weight in _saved_modules(model, whole.modules).items()}
    shapes |= {name: tuple(model.get_parameter(name).shape) for name in whole.head}
    if rows:
        shapes |= {name + ROWS_SUFFIX: (len(rows), weight.shape[1]) for name, weight in tables(model).items()}
    return shapes


def tensor_problems(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tensors that are missing, unknown, or of another shape than `shapes` has by their names."""
    problems = [f"no weights for {name}" for name in shapes if name not in tensors]
    problems += [f"unknown tensor {name}" for name in sorted(tensors) if name not in shapes]
    return problems + [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]


def _unequal_ties(model: PreTrainedModel, whole: Whole, tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    first: dict[int, str] = {}
    for name, weight in _saved_modules(model, whole.modules).items():
        other = first.setdefault(id(weight), name)
        if other in tensors and name in tensors and not torch.equal(tensors[other], tensors[name]):
            problems.append(f"{other} and {name} differ, but are one weight in the model (tied)")
    return problems
