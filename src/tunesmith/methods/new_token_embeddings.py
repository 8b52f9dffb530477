"""Training of single rows of the embedding and the output layer: of new tokens, with adapters, and in full
tuning of the tokens that occur in the data.

The rows stay in the model's own weights, so that every forward is the model's own. Only the backward differs:
it computes gradients of those rows alone.
"""

# T tokens, D hidden size, V vocabulary, K rows

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError

ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
"""Behind the name of a module: the rows as peft calls them."""


class TokenRows:
    """Rows of each weight that has one for every token; a tied one once."""

    def __init__(
        self, model: PreTrainedModel, ids: Sequence[int], *, among: Mapping[str, Tensor] | None = None
    ) -> None:
        """`among`: only these weights, by the names of their modules; a gradient of another row is an error.

        Raises RecipeError for an embedding with a forward of its own."""
        self.ids = tuple(ids)
        self.parameters: dict[str, nn.Parameter] = {}
        """[K, D] in the model's precision, by the name of the module and ROWS_SUFFIX; gradients arrive here."""
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}
        self._modules: list[nn.Module] = []
        for table, weight in (tables(model) if among is None else among).items():
            ids_K = torch.tensor(self.ids, device=weight.device)
            rows = nn.Parameter(weight.detach()[ids_K].clone())
            for name, module in model.named_modules():
                if module._parameters.get("weight") is weight:
                    module.forward = _forward(name, module, rows, self.ids, ids_K, alone=among is not None)
                    self._modules.append(module)
            self.parameters[table + ROWS_SUFFIX] = rows
            self._weights[table + ROWS_SUFFIX] = (weight, ids_K)

    @property
    def names(self) -> list[str]:
        """The modules that have the rows, a tied one by its first name."""
        return [key.removesuffix(ROWS_SUFFIX) for key in self.parameters]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the rows into the weights of the model."""
        for name, (weight, ids_K) in self._weights.items():
            weight.index_copy_(0, ids_K, self.parameters[name].detach())

    def unload(self) -> None:
        """Restore the modules' own backward; the rows stay in their weights."""
        for module in self._modules:
            del module.forward
        self._modules = []


def tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that have a row for every token, by the name of the first module that has it."""
    by_name: dict[str, Tensor] = {}
    for anchor in (model.get_input_embeddings(), model.get_output_embeddings()):
        if anchor is not None and not any(anchor.weight is weight for weight in by_name.values()):
            name = next(n for n, module in model.named_modules() if module._parameters.get("weight") is anchor.weight)
            by_name[name] = anchor.weight
    return by_name


def sole_embedding(model: PreTrainedModel) -> str | None:
    """The name of the input embedding, if it is torch's, its weight is not tied, and it reads rows as they are
    encoded: decoders of encoder–decoders add a first token. None otherwise."""
    embedding = model.get_input_embeddings()
    owners = [name for name, module in model.named_modules() if module._parameters.get("weight") is embedding.weight]
    if model.config.is_encoder_decoder or len(owners) > 1 or type(embedding).forward is not nn.Embedding.forward:
        return None
    is_plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return owners[0] if is_plain else None


def _forward(name: str, module: nn.Module, rows: Tensor, ids: tuple[int, ...], ids_K: Tensor, *, alone: bool) -> Any:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return partial(_head, module, rows, ids_K)
    is_plain = type(module).forward is nn.Embedding.forward
    scale: Any = 1.0 if is_plain else getattr(module, "embed_scale", None)  # the factor of Gemma's
    if not isinstance(module, nn.Embedding) or scale is None:
        raise RecipeError(
            f"data.new_tokens: {name} computes in its own way, of which rows cannot be trained alone. Train it "
            f"whole: method.also_train: {name.rpartition('.')[2]}"
        )
    places_V = torch.full((module.num_embeddings,), len(ids), device=ids_K.device)
    places_V[ids_K] = torch.arange(len(ids), device=ids_K.device)
    padding = ids.index(module.padding_idx) if module.padding_idx in ids else -1
    return partial(_embed, module, rows, places_V, _Table(float(scale), padding, alone=alone))


@dataclass(slots=True)
class _Table:
    """Facts of an embedding."""

    scale: float
    padding: int
    """Position of the row that never learns; -1: none."""
    alone: bool
    """A gradient of any other row is an error."""
    seen: bool = False
    """Whether there was a backward."""


def _embed(module: nn.Module, rows: Tensor, places_V: Tensor, table: _Table, ids: Tensor) -> Tensor:
    with torch.no_grad():
        embedded = type(module).forward(module, ids)
    out: Tensor = _Embedded.apply(rows, embedded, places_V[ids], table)  # type: ignore[no-untyped-call]
    return out


def _head(module: nn.Module, rows: Tensor, ids_K: Tensor, x: Tensor) -> Tensor:
    out: Tensor = _Headed.apply(x, rows, module.weight, module.bias, ids_K)  # type: ignore[no-untyped-call]
    return out


class _Embedded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_KD: Tensor, embedded: Tensor, places: Tensor, table: _Table) -> Tensor:
        ctx.save_for_backward(places)
        ctx.like, ctx.table = rows_KD.detach(), table
        return embedded.view_as(embedded)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (places,), table, num_rows = ctx.saved_tensors, ctx.table, len(ctx.like)
        # As torch's own embedding, so that each row's sum has the same order; the last takes all other rows.
        grads = torch.ops.aten.embedding_dense_backward(g.float(), places, num_rows + 1, table.padding, False)
        grad_KD, lost_D = grads[:num_rows], grads[num_rows]
        # Looked at once on a CUDA device: the processor waits for the answer.
        is_checked = lost_D.device.type == "cuda" and table.seen
        is_lost_D = (lost_D != 0) & lost_D.isfinite()  # no numbers are for the step, which may try again
        if table.alone and not lost_D.is_meta and not is_checked and bool(is_lost_D.any()):
            raise ModelError("a token learns whose row of the embedding is not trained: this is an error of Tunesmith")
        table.seen = True
        return grad_KD.mul_(table.scale).to(ctx.like.dtype), None, None, None


class _Headed(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 — autograd.Function takes positional arguments only
        ctx: Any, x: Tensor, rows_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, ids_K: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, ids_K)
        ctx.weight_VD = weight_VD
        return F.linear(x, weight_VD, bias_V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, ids_K = ctx.saved_tensors
        gx = g @ ctx.weight_VD if ctx.needs_input_grad[0] else None
        g_TK = g.reshape(-1, g.shape[-1]).index_select(1, ids_K)
        return gx, g_TK.t() @ x.reshape(-1, x.shape[-1]), None, None, None
