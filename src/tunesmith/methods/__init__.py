"""How weights change: one entry a method.

A method attaches to a loaded model and gives an `Attachment`: what is trained, and how it reaches the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.errors import CheckpointError
from tunesmith.methods import full, lora, peft_format
from tunesmith.types import Attachment


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train a model."""

    name: str
    doc: str
    attach: Callable[..., Attachment]
    """(model, settings, *, seed) -> Attachment. Sets what is trained and what is frozen; outputs do not change."""
    save_result: Callable[..., None]
    """(attachment, folder, *, model, renderer, located) -> None. The result, whole or not at all."""
    load_result: Callable[..., Attachment]
    """(model, folder) -> Attachment. Put a saved result on its base model; strict."""


METHODS: dict[str, Method] = {
    "lora": Method(
        name="lora",
        doc="Low-rank adapters beside the frozen linear layers; the result is an adapter in PEFT's format.",
        attach=lora.attach,
        save_result=peft_format.save_result,
        load_result=peft_format.load_adapter,
    ),
    "dora": Method(
        name="dora",
        doc="LoRA that also trains the length of each row of a weight; the result is an adapter in PEFT's format.",
        attach=lora.attach,
        save_result=peft_format.save_result,
        load_result=peft_format.load_adapter,
    ),
    "full": Method(
        name="full",
        doc="Every weight is trained, with float32 masters; the result is a model folder.",
        attach=full.attach,
        save_result=full.save_result,
        load_result=full.load_result,
    ),
}


@torch.no_grad()
def restore(attachment: Attachment, tensors: Mapping[str, Tensor]) -> None:
    """Put back the values of `attachment.trained` from a checkpoint, bit for bit, and publish them.

    Raises:
        CheckpointError: a name or shape that does not fit; nothing was changed.
    """
    trained = attachment.trained
    if trained.keys() != tensors.keys():
        odd = sorted(trained.keys() ^ tensors.keys())
        raise CheckpointError(f"weights: {len(odd)} names differ from what is trained, among them {odd[0]}")
    for name, tensor in trained.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise CheckpointError(f"weights: {name}: {tensors[name].dtype} {tuple(tensors[name].shape)} does not fit")
    for name, tensor in trained.items():
        tensor.copy_(tensors[name])
    attachment.publish()
