"""Adapters on disk, in the format of the peft library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError
from tunesmith.methods.lora import MAGNITUDE, Adapted, LoraAttachment, Whole, wrap
from tunesmith.methods.lora_layer import shape_OI
from tunesmith.methods.patterns import CONFIG
from tunesmith.methods.peft_config import Saved, module_names, read_config, to_config
from tunesmith.methods.targets import named_targets, shared_weights
from tunesmith.methods.token_rows import ROWS, misfits
from tunesmith.methods.whole import find_biases, saved_modules, tied_modules, weights_of
from tunesmith.models import heads
from tunesmith.models.save import save_tokenizer
from tunesmith.models.special_tokens import with_pad_token
from tunesmith.recipe.methods import DoraMethod
from tunesmith.runs.atomic import remove, replace_folder, storing, temporary_folder

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.models.resolve_model import ModelRef

WEIGHTS = "adapter_model.safetensors"

PREFIX = "base_model.model."
_BASE_BIAS = ".base_layer.bias"
_KEY = re.compile(r"(?P<name>.+)\.(?:lora_[AB]\.weight|lora_magnitude_vector)")


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
        tensors = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(attachment).items()}
        weights = save(tensors, metadata={"format": "pt"})
        config = json.dumps(to_config(attachment, base=base, revision=revision), indent=2, sort_keys=True) + "\n"
        with storing(folder, num_bytes=len(weights) + len(config)):
            (beside / WEIGHTS).write_bytes(weights)
            (beside / CONFIG).write_text(config, encoding="utf-8")
            add(beside)
        replace_folder(beside, folder, swap=True)
    except BaseException:
        remove(beside)
        raise


@torch.no_grad()
def _tensors(attachment: LoraAttachment) -> dict[str, Tensor]:
    """Everything trained, as the file names it."""
    tensors = dict(attachment.trained)
    for name, layer in attachment.layers.items():
        tensors |= zip(
            (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
            layer.with_start(*attachment.matrices(name)),
            strict=True,
        )
    masters = {id(weight): attachment.trained[name] for name, weight in attachment.weights.items()}
    for name, weight in saved_modules(attachment.model, attachment.whole.modules).items():
        tensors[name] = masters[id(weight)].clone()  # tied ones stand there twice, and safetensors wants no sharing
    for name in attachment.whole.biases:
        tensors[_bias_key(name, attachment.layers)] = tensors.pop(name)
    return tensors


def _bias_key(name: str, adapted: Mapping[str, object]) -> str:
    layer = name.removesuffix(".bias")
    return layer + _BASE_BIAS if layer in adapted else name


def save_result(
    attachment: LoraAttachment, folder: Path, *, model: PreTrainedModel, renderer: Renderer, located: ModelRef
) -> None:
    """The adapter, the labels of a head, and the tokenizer with the template it was trained with; other settings stay
    those of the base.

    The base goes down as its hub id and commit, or as the whole path of a folder or file.
    """
    base = located.name if located.kind == "hub" else str(located.path.resolve())

    def add(folder: Path) -> None:
        save_tokenizer(with_pad_token(model, renderer.tokenizer), folder, located=located)
        heads.write_labels(model, folder)

    save_adapter(attachment, folder, base=base, revision=located.revision, add=add)


def load_adapter(model: PreTrainedModel, folder: Path) -> LoraAttachment:
    """Put a saved adapter on `model`, its base: one of ours, or a LoRA or DoRA written by peft.

    Raises:
        ModelError: a file that is missing or broken, a kind of adapter that changes the base, other labels, or weights
            that are not exactly those of the layers it names and of the model's head; the model was not changed.
    """
    heads.check_labels(model, folder)
    saved = read_config(folder)
    tensors = _read_weights(folder)
    names = {match["name"] for key in tensors if (match := _KEY.fullmatch(key))}
    expected = {name for name in module_names(model) if saved.means(name)}
    targets = named_targets(model, sorted(expected | names))
    fit = {name for target in targets for name in target.names}
    problems = [f"no linear layer {name} in the model" for name in sorted((expected | names) - fit)]
    problems += [f"no weights for {name}" for name in sorted(expected - names)]
    problems += [f"weights for {name}, which target_modules does not name" for name in sorted(names - expected)]
    adapted = [saved.sized(target) for target in targets]
    whole = _whole(folder, saved, model, adapted)
    problems += [f"{name} is adapted and whole" for name in sorted(fit) if _inside(name, whole.modules)]
    problems += _misfits(saved, model, adapted, whole, tensors)
    problems += shared_weights(model, targets)
    indices = saved.token_rows()
    problems += misfits(model, indices, tensors)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{folder}: does not fit {saved.base}: {'; '.join(problems[:5])}{more}")
    by_layer = {one.target.name: one for one in adapted}
    attachment = wrap(model, adapted, whole=whole, settings=saved.settings, rows=min(indices.values(), default=()))
    with torch.no_grad():
        for name, master in attachment.trained.items():
            master.copy_(tensors[_bias_key(name, by_layer) if name in whole.biases else name])
    attachment.publish()
    return attachment


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _whole(folder: Path, saved: Saved, model: PreTrainedModel, adapted: Sequence[Adapted]) -> Whole:
    """What an adapter brings whole, as peft finds it: modules by the ends of their names, biases by a word.

    Raises ModelError for biases that the model has not.
    """
    ends = tuple(saved.config.get("modules_to_save") or ())
    found = [name for name, _ in model.named_modules() if ends and name.endswith(ends)]
    known = heads.new_head_names(model)
    head = [name for name, _ in model.named_parameters() if any(name.startswith(f"{one}.") for one in found)]
    head = [name for name in head if name in known]
    modules = [name for name in found if not any(weight.startswith(f"{name}.") for weight in head)]
    outermost = [name for name in modules if not any(name.startswith(f"{other}.") for other in modules)]
    once = [
        name for name in outermost if not set(tied_modules(model, [name])) & set(outermost[: outermost.index(name)])
    ]
    names = {*head, *weights_of(model, once)}
    try:
        biases = find_biases(model, saved.settings.bias, [one.target for one in adapted], known=names)
    except RecipeError as error:
        raise ModelError(f"{folder}: {error}") from error
    return Whole(tuple(head), tuple(once), biases)


def _misfits(
    saved: Saved, model: PreTrainedModel, adapted: Sequence[Adapted], whole: Whole, tensors: Mapping[str, Tensor]
) -> list[str]:
    """What the file lacks, has too much, or in another shape."""
    problems = _head_misfits(model, whole.head, tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    for one in adapted:
        shapes |= _shapes(one, has_lengths=isinstance(saved.settings, DoraMethod))
    by_layer = {one.target.name: one for one in adapted}
    shapes |= {_bias_key(name, by_layer): tuple(model.get_parameter(name).shape) for name in whole.biases}
    modules = saved_modules(model, whole.modules)
    shapes |= {name: tuple(weight.shape) for name, weight in modules.items()}
    for name, shape in shapes.items():
        if name not in tensors:
            problems.append(f"no {name}")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    first: dict[int, str] = {}
    for name, weight in modules.items():
        other = first.setdefault(id(weight), name)
        if other in tensors and name in tensors and not torch.equal(tensors[other], tensors[name]):
            problems.append(f"{other} and {name} differ, but are one weight in the model (tied)")
    known = {*shapes, *whole.head}
    problems += [
        f"unknown tensor {key}"
        for key in sorted(tensors)
        if not _KEY.fullmatch(key) and key not in known and not key.endswith(ROWS)
    ]
    return problems


def _head_misfits(model: nn.Module, head: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    drawn = heads.new_param_names(model)
    needed = [
        name
        for name in heads.new_head_names(model)
        if name in drawn or not name.startswith(f"{model.base_model_prefix}.")
    ]
    problems = [f"no weights for the head's {name}" for name in needed if name not in head]
    for name in head:
        shape = tuple(model.get_parameter(name).shape)
        if name not in tensors:
            problems.append(f"no weights for the head's {name}")
        elif tuple(tensors[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, expected {shape}")
    return problems


def _shapes(one: Adapted, *, has_lengths: bool) -> dict[str, tuple[int, ...]]:
    """What the file holds of one layer."""
    num_outputs, num_inputs = shape_OI(one.target.module)
    name = one.target.name
    shapes = {f"{name}.lora_A.weight": (one.rank, num_inputs), f"{name}.lora_B.weight": (num_outputs, one.rank)}
    return shapes | ({f"{name}.{MAGNITUDE}": (num_outputs,)} if has_lengths else {})


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors by name of the layer, e.g. `model.layers.0.self_attn.q_proj.lora_A.weight`."""
    path = folder / WEIGHTS
    if not path.exists():
        raise ModelError(f"{path}: missing. Weights in .bin files are not read: save the adapter as safetensors.")
    try:
        return {key.removeprefix(PREFIX): tensor for key, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
