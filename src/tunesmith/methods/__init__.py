"""Training methods, one row each in METHODS: add a method by writing its file and its row.

A method attaches to a loaded model, which gives an `Attachment`: the tensors that are trained, and their way
into the model. Everything that other rooms have to know about a method is a field of its row; none of them
tests classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tunesmith.data.dataset import RowStore
from tunesmith.errors import CheckpointError
from tunesmith.methods import adapter_format, full, lora, peft
from tunesmith.methods.qlora import BASE_FORMAT, packing, quantize_base
from tunesmith.models.quantized import PackOnLoad
from tunesmith.optim import OPTIMIZERS
from tunesmith.recipe.methods import MethodOptions
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Attachment, HeadName


def _to_device(model: PreTrainedModel, settings: Any, *, device: str) -> tuple[str, ...]:
    model.to(device)
    return ()


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train a model. `settings` is the recipe's `method` section, of the method's own class."""

    name: str
    doc: str
    attach: Callable[..., Attachment]
    """(model, settings, *, seed) -> Attachment. Freezes the model and adds what is trained; outputs stay."""
    save_result: Callable[..., None]
    """(attachment, folder, *, model, renderer, located) -> None. Writes the result, complete or not at all."""
    load_result: Callable[..., Attachment]
    """(model, folder) -> Attachment. Puts a saved result on its base model; strict."""
    learning_rate: Callable[[Any, str, int], tuple[float, str]]
    """(settings, kind of model, number of its weights) -> (usual peak rate with AdamW, reason)."""
    describe: Callable[[Any], str]
    """(settings) -> one sentence for a model card."""
    prepare_base: Callable[..., tuple[str, ...]] = _to_device
    """(model, settings, *, device) -> notes. Moves a loaded model to the device, as the method's base."""

    packing: Callable[[Any], PackOnLoad | None] = lambda settings: None
    """(settings) -> how weights are packed as they are read; None: they are read as is. Raises RecipeError."""

    is_adapter: bool = True
    """The result is an adapter on an untouched base. False: a model folder, complete in itself."""
    low_rank: bool = False
    """Settings are a `LowRankMethod` (rank, alpha, targets), the result is LoRA or DoRA in peft's format."""
    quantizes: bool = False
    """The base is kept in 4 bits; no fused LoRA kernels."""
    fused_loss: bool = True
    """The output layer and the loss may be computed together, in pieces."""
    new_tokens: bool = True
    """Rows of tokens that the recipe adds can be trained."""
    reads_tokens: bool = False
    """`attach` takes `tokens`, all ids that training can meet, ascending; None where they are not known."""
    kept_activations: float = 1.15
    """Activations kept for backward, as a multiple of the inputs and outputs of the linear layers; measured."""
    package: str | None = None
    """The optional package that it needs."""

    check: Callable[[Any], Any] = lambda settings: None
    """(settings), against what is installed. Raises RecipeError."""
    randomness: Callable[[Any], str | None] = lambda settings: None
    """(settings) -> option that makes a forward pass random in training, such as dropout; None: none does."""
    can_merge: Callable[[Any], bool] = lambda settings: True
    """(settings) -> whether the result is a change of weights, so that it can be merged into its base."""
    base_format: str = ""
    """Storage of the weights of the base, as in `nf4 with scales in 8 bits`; empty: as they are."""
    unshareable: Callable[[Any], str | None] = lambda settings: None
    """(settings) -> why the result cannot share one base in memory with other adapters; None: it can."""


_LOW_RANK: dict[str, Any] = {
    "attach": lora.attach,
    "save_result": adapter_format.save_result,
    "load_result": adapter_format.load_adapter,
    "learning_rate": lora.learning_rate,
    "describe": lora.describe,
    "low_rank": True,
    "randomness": lambda settings: "method.dropout" if settings.dropout else None,
    "unshareable": lora.unshareable,
}

METHODS: dict[str, Method] = {
    "lora": Method(
        name="lora",
        doc="Low-rank adapters on the frozen linear layers; the result is an adapter in PEFT's format.",
        **_LOW_RANK,
    ),
    "dora": Method(
        name="dora",
        doc="LoRA that also trains the length of each row of a weight; the result is an adapter in PEFT's format.",
        kept_activations=1.7,
        **_LOW_RANK,
    ),
    "qlora": Method(
        name="qlora",
        doc="LoRA on a base that is kept in 4 bits; the result is an adapter in PEFT's format.",
        prepare_base=quantize_base,
        packing=packing,
        quantizes=True,
        package="bitsandbytes",
        base_format=BASE_FORMAT,
        **_LOW_RANK,
    ),
    "full": Method(
        name="full",
        doc="Every weight is trained, through float32 master weights; the result is a model folder.",
        attach=full.attach,
        save_result=full.save_result,
        load_result=full.load_result,
        learning_rate=full.learning_rate,
        describe=full.describe,
        is_adapter=False,
        reads_tokens=True,
        unshareable=lambda settings: "every weight of it was tuned",
    ),
    "peft": Method(
        name="peft",
        doc="Any method of the installed peft library by its name; the result is an adapter in PEFT's format.",
        attach=peft.attach,
        save_result=peft.save_result,
        load_result=peft.load_result,
        learning_rate=peft.learning_rate,
        describe=lambda settings: f"{settings.kind} of the peft library, {settings.settings or 'as it is'}.",
        fused_loss=False,
        new_tokens=False,
        package="peft",
        check=peft.make_config,
        randomness=peft.randomness,
        can_merge=lambda settings: settings.kind in peft.MERGEABLE,
        unshareable=lambda settings: "method peft is more than low-rank paths on layers",
    ),
}


def method_of(options: MethodOptions) -> Method:
    """The row of a method; for `auto`, which becomes lora or full, lora's."""
    return METHODS["lora" if options.name == "auto" else options.name]


def attach(
    recipe: Recipe, model: PreTrainedModel, *, head: HeadName, store: RowStore | None, pad_id: int
) -> Attachment:
    """Put a recipe's method on its model.

    `store`: the rows that are trained on; None: unknown. Full tuning trains only the embeddings of their
    tokens, and of `pad_id` where rows may be padded: the others get no gradient. Raises what the method's own
    `attach` raises.
    """
    method = METHODS[recipe.method.name]
    if not method.reads_tokens:
        return method.attach(model, recipe.method, seed=recipe.seed)
    # Masked words become any other at random; some optimizers' updates of a row depend on all rows.
    is_known = store is not None and head != "masked_token" and OPTIMIZERS[recipe.optim.name].spares_zeros
    draws = recipe.reinforce.grader is not None or recipe.distil.on_policy
    is_known = is_known and not draws  # a drawn answer may have any token
    tokens: Sequence[int] | None = store.tokens.tolist() if store is not None and is_known else None
    if tokens is not None and head != "next_token":  # no padding precedes a token predicted from the left
        tokens = sorted({*tokens, pad_id})
    return method.attach(model, recipe.method, seed=recipe.seed, tokens=tokens)


@torch.no_grad()
def restore(attachment: Attachment, tensors: Mapping[str, Tensor]) -> None:
    """Put the trained tensors of a checkpoint back, bit for bit, and publish them.

    Raises:
        CheckpointError: a name or shape that does not fit; nothing was changed.
    """
    expected = attachment.trained
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())
        message = f"weights: {len(odd)} names differ from what is trained, among them {odd[0]}."
        raise CheckpointError(message)
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape or tensors[name].dtype != tensor.dtype:
            raise CheckpointError(f"weights: {name}: {tensors[name].dtype} {tuple(tensors[name].shape)} does not fit")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    attachment.publish()
