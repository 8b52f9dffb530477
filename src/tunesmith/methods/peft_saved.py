"""What peft's method made, on disk: adapter_config.json and adapter_model.safetensors, as peft itself writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.methods.adalora import KIND
from tunesmith.methods.patterns import CONFIG, PATTERNS, spelled_out
from tunesmith.methods.peft_bridge import INSIDE, PeftAttachment, short_name, silent, tensors_of
from tunesmith.methods.peft_format import WEIGHTS
from tunesmith.methods.peft_kinds import import_peft, is_prompt
from tunesmith.models import heads
from tunesmith.models.save import save_tokenizer
from tunesmith.models.special_tokens import with_pad_token
from tunesmith.runs.atomic import remove, replace_folder, storing, temporary_folder

if TYPE_CHECKING:
    from tunesmith.data.renderer import Renderer
    from tunesmith.models.resolve_model import ModelRef


def save_result(
    attachment: PeftAttachment, folder: Path, *, model: PreTrainedModel, renderer: Renderer, located: ModelRef
) -> None:
    """The adapter as peft saves it, whole or not at all, the labels of a head, and the tokenizer.

    The base goes down as its hub id and commit, or as the whole path of a folder or file.
    """
    base = located.name if located.kind == "hub" else str(located.path.resolve())
    settings = {**attachment.config.to_dict(), "base_model_name_or_path": base, "revision": located.revision}
    settings["inference_mode"] = True
    config = json.dumps(settings, indent=2, sort_keys=True, default=_plain) + "\n"
    beside = temporary_folder(folder.parent, folder.name)
    try:
        weights = save(attachment.tensors(), metadata={"format": "pt"})
        with storing(folder, num_bytes=len(weights) + len(config)):
            (beside / WEIGHTS).write_bytes(weights)
            (beside / CONFIG).write_text(config, encoding="utf-8")
            save_tokenizer(with_pad_token(model, renderer.tokenizer), beside, located=located)
            heads.write_labels(model, beside)
        replace_folder(beside, folder, swap=True)
    except BaseException:
        remove(beside)
        raise


def _plain(value: Any) -> Any:
    return (
        sorted(value) if isinstance(value, (set, frozenset)) else value.value if isinstance(value, Enum) else str(value)
    )


def load_result(model: PreTrainedModel, folder: Path) -> PeftAttachment:
    """Put a saved result on `model`, its base, as peft does, but strictly.

    Raises:
        ModelError: a file that is missing or broken, other labels, or tensors that are not exactly those of the method.
    """
    heads.check_labels(model, folder)
    peft = import_peft()
    from peft import set_peft_model_state_dict

    training = model.training
    try:
        tensors = load_file(folder / WEIGHTS)
        with silent():
            config = peft.PeftConfig.from_pretrained(str(folder))
            names = [name for name, _ in model.named_modules()]
            said = {key: getattr(config, key) for key in PATTERNS if hasattr(config, key)}
            for key, value in spelled_out(said, names).items():
                setattr(config, key, value)
            kind = str(config.peft_type.value)
            config.inference_mode = is_prompt(kind)
            wrapped = peft.get_peft_model(model, config)
            if problems := _misfits(tensors, tensors_of(wrapped)):
                raise ModelError(f"{folder}: does not fit: {'; '.join(problems[:5])}")
            set_peft_model_state_dict(wrapped, tensors)
            if kind == KIND:
                _widen(wrapped, tensors)
            attachment = PeftAttachment(model, wrapped, kind)  # after it: some kinds make their tensors anew then
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{folder}: cannot be read as an adapter of peft: {error}") from error
    model.train(training)
    return attachment


def _widen(wrapped: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give matrices the values and the type they were saved with: peft makes them anew at the ranks of the file, and
    casts them to the type of the base."""
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = tensors[f"{INSIDE}{short_name(name)}"].to(parameter.device)


def _misfits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    problems = [f"no {name}" for name in expected if name not in found]
    problems += [f"unknown tensor {name}" for name in found if name not in expected]
    return problems + [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
