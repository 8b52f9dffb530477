"""How weights change: one entry a method.

A method attaches to a loaded model and gives an `Attachment`: what is trained, and how it reaches the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.errors import CheckpointError
from tunesmith.methods import full, lora, peft_bridge, peft_format, peft_saved
from tunesmith.methods.quantize import quantize_base
from tunesmith.recipe.sections import Section
from tunesmith.types import Attachment


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train a model."""

    name: str
    doc: str
    ready: Callable[..., tuple[str, ...]]
    """(model, settings, *, device) -> notes. Put a model that was just loaded on the device, as the method's base."""
    attach: Callable[..., Attachment]
    """(model, settings, *, seed) -> Attachment. Sets what is trained and what is frozen; outputs do not change."""
    save_result: Callable[..., None]
    """(attachment, folder, *, model, renderer, located) -> None. The result, whole or not at all."""
    load_result: Callable[..., Attachment]
    """(model, folder) -> Attachment. Put a saved result on its base model; strict."""


def _as_it_is(model: PreTrainedModel, settings: Section, *, device: str) -> tuple[str, ...]:
    model.to(device)
    return ()


METHODS: dict[str, Method] = {
    "lora": Method(
        name="lora",
        doc="Low-rank adapters beside the frozen linear layers; the result is an adapter in PEFT's format.",
        ready=_as_it_is,
        attach=lora.attach,
        save_result=peft_format.save_result,
        load_result=peft_format.load_adapter,
    ),
    "dora": Method(
        name="dora",
        doc="LoRA that also trains the length of each row of a weight; the result is an adapter in PEFT's format.",
        ready=_as_it_is,
        attach=lora.attach,
        save_result=peft_format.save_result,
        load_result=peft_format.load_adapter,
    ),
    "qlora": Method(
        name="qlora",
        doc="LoRA on a base that is kept in 4 or 8 bits; the result is an adapter in PEFT's format.",
        ready=quantize_base,
        attach=lora.attach,
        save_result=peft_format.save_result,
        load_result=peft_format.load_adapter,
    ),
    "full": Method(
        name="full",
        doc="Every weight is trained, with float32 masters; the result is a model folder.",
        ready=_as_it_is,
        attach=full.attach,
        save_result=full.save_result,
        load_result=full.load_result,
    ),
    "peft": Method(
        name="peft",
        doc="Any method of the installed peft library by its name; the result is an adapter in PEFT's format.",
        ready=_as_it_is,
        attach=peft_bridge.attach,
        save_result=peft_saved.save_result,
        load_result=peft_saved.load_result,
    ),
}


def merge(attachment: Any) -> None:
    """Put an adapter into the weights of its base and take it off: what is left is a plain model.

    Raises InputError for one that is no change of weights.
    """
    if isinstance(attachment, peft_bridge.PeftAttachment):
        attachment.merge()
    else:
        lora.merge(attachment)


def without(attachment: Any) -> AbstractContextManager[None]:
    """A block inside which the model answers without its adapter; what is trained whole stays as it was trained."""
    if isinstance(attachment, peft_bridge.PeftAttachment):
        return attachment.without()
    return lora.without_adapter(attachment)


def is_beside(attachment: Any) -> bool:
    """Whether the base is there too, under an adapter that can be looked past."""
    return isinstance(attachment, (lora.LoraAttachment, peft_bridge.PeftAttachment)) and attachment.is_beside


def carried(attachment: Attachment) -> dict[str, Tensor]:
    """What a checkpoint holds of a method, not copied: what is trained, and what steers it."""
    steering = attachment.steering
    return {**attachment.trained, **(steering.state() if steering is not None else {})}


@torch.no_grad()
def restore(attachment: Attachment, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `carried` gave from a checkpoint, bit for bit, and publish it.

    Raises:
        CheckpointError: a name or shape that does not fit; nothing was changed.
    """
    expected = carried(attachment)
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        raise CheckpointError(f"weights: {len(odd)} names differ from what is trained, among them {odd[0]}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise CheckpointError(f"weights: {name}: {tensors[name].dtype} {tuple(tensors[name].shape)} does not fit")
    for name, tensor in attachment.trained.items():
        tensor.copy_(tensors[name])
    if attachment.steering is not None:
        attachment.steering.load(tensors)
    attachment.publish()
