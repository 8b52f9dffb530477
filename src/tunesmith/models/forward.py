"""The model's answers at the targets of a batch, whatever its layout."""

# B rows, T tokens, N targets, D hidden size, V vocabulary, C classes

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

from torch import Tensor, nn

from tunesmith.models.attention import packed_forward
from tunesmith.models.heads import pools_last
from tunesmith.models.image_features import image_inputs
from tunesmith.models.segments import Segments, UnsupportedAttentionError
from tunesmith.types import Batch, JsonObject, Segment


def logits_at_targets(model: nn.Module, batch: Batch) -> Tensor:
    """[N, V] in the model's dtype: row n predicts batch.targets_N[n], a token or the class of one. No other
    position meets the output layer.

    A packed batch needs a model that was given to `attention.use_packed_attention`.
    """
    with _at_positions(model, batch.predict_N) as done, _attention_of(batch):
        logits: Tensor = model(**_inputs(model, batch)).logits
    return logits[0] if done else logits.flatten(0, 1)[batch.predict_N]


def sequence_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, C]: the classes of each row, or its number. A causal model answers at its last token, known by the
    row's length and never by the pad token."""
    if not pools_last(model):
        with _attention_of(batch), _first_alone(model, batch):
            logits_BC: Tensor = model(**_inputs(model, batch)).logits
        return logits_BC
    pooled: Tensor = model.score(hidden_at_targets(model, batch))  # type: ignore[operator]
    return pooled


def hidden_at_targets(model: nn.Module, batch: Batch) -> Tensor:
    """[N, D] in the model's dtype: what the head reads at the position of each target."""
    with _attention_of(batch):
        hidden_BTD: Tensor = model.base_model(**_inputs(model, batch)).last_hidden_state  # type: ignore[operator]
    return hidden_BTD.flatten(0, 1)[batch.predict_N]


def _inputs(model: nn.Module, batch: Batch) -> JsonObject:
    inputs: dict[str, Any] = {"input_ids": batch.ids_BT}
    if has_cache(type(model).forward):
        inputs["use_cache"] = False
    if batch.types_BT is not None:
        inputs["token_type_ids"] = batch.types_BT
    if batch.decoder_ids_BU is not None:
        inputs["decoder_input_ids"] = batch.decoder_ids_BU
    filling = [batch.filling] if batch.filling else []
    if batch.images:
        lengths = (*batch.lengths, *filling) if batch.layout == "packed" else ()
        seen = image_inputs(model, batch.ids_BT, batch.mask_BT, batch.images, lengths=lengths)
        inputs |= {"use_cache": False, **seen}
    if batch.layout != "packed":
        return {**inputs, "attention_mask": batch.mask_BT}
    positions_BT = batch.positions_BT + _first_position(model)
    if batch.pieces:
        segments = Segments.sharing([*batch.pieces, *map(Segment, filling)], device=positions_BT.device)
    else:
        segments = Segments.of([*batch.lengths, *filling], device=positions_BT.device)
    return {"position_ids": positions_BT, **inputs, "segments": segments}


@cache
def has_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def _attention_of(batch: Batch) -> Any:
    return packed_forward() if batch.layout == "packed" else nullcontext()


@contextmanager
def _at_positions(model: nn.Module, positions_N: Tensor) -> Iterator[list[bool]]:
    """Let the output layers see the N positions alone, not all B × T; the list stays empty if they do not.

    Not every model has an argument for this (logits_to_keep of causal ones), and none keeps other positions for
    each row.
    """
    done: list[bool] = []

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        done.append(True)
        hidden_BTD: Tensor = output[0]
        output[next(iter(output))] = hidden_BTD.flatten(0, 1)[positions_N][None]
        return output

    with body_of(model).register_forward_hook(keep):
        yield done


@contextmanager
def _first_alone(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Let the pooler and head of a packed encoder see the first token of each row alone, as BERT's need it.

    `packing_check` finds out whether a model's own read no other.
    """
    if batch.layout != "packed":
        yield
        return

    def keep(module: nn.Module, args: Any, output: Any) -> Any:
        hidden_1TD: Tensor = output[0]
        first_B1D = hidden_1TD[0, batch.predict_N][:, None]
        if isinstance(output, Tensor):
            return first_B1D
        output[next(iter(output))] = first_B1D
        return output

    with _layers(model).register_forward_hook(keep):
        yield


def _layers(model: nn.Module) -> nn.Module:
    base: nn.Module = model.base_model  # type: ignore[assignment]
    for name in ("encoder", "transformer"):
        if hasattr(base, name):
            layers: nn.Module = getattr(base, name)
            return layers
    raise UnsupportedAttentionError("its layers cannot be separated from its head")


def _first_position(model: nn.Module) -> int:
    """The position of a row's first token: RoBERTa and its like count from behind the padding's id."""
    embeddings = getattr(model.base_model, "embeddings", None)
    if hasattr(embeddings, "create_position_ids_from_input_ids"):
        return int(embeddings.padding_idx) + 1  # type: ignore[union-attr]
    return 0


def body_of(model: nn.Module) -> nn.Module:
    """The part of the model that the output layers read: the base model, or its decoder."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    return getattr(base, "decoder", base)
