"""Some rows of the embedding, and of a head beside it: of new tokens, trained beside adapters, and in full tuning of
the tokens that occur at all.

The rows lie in the model's own weights, where the update puts them, so that every forward is the model's own and a
merged model is the live one. What is different is the backward: gradients of those rows alone are computed.
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
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from tunesmith.errors import ModelError, RecipeError

ROWS = ".token_adapter.trainable_tokens_delta"
"""Behind the name of a module: the rows as peft calls them."""


class TokenRows:
    """Rows of each weight that has one for every token; a tied one once."""

    def __init__(
        self, model: PreTrainedModel, ids: Sequence[int], *, among: Mapping[str, Tensor] | None = None
    ) -> None:
        """`among`: these weights alone, by the names of their modules, in whose passes no other token may learn.

        Raises RecipeError for an embedding that computes in a way that is not known here."""
        self.ids = tuple(ids)
        self.parameters: dict[str, nn.Parameter] = {}
        """What computes gradients, [K, D] in the model's precision, by the name of the module and ROWS."""
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}
        self._modules: list[nn.Module] = []
        for table, weight in (tables(model) if among is None else among).items():
            ids_K = torch.tensor(self.ids, device=weight.device)
            rows = nn.Parameter(weight.detach()[ids_K].clone())
            for name, module in model.named_modules():
                if module._parameters.get("weight") is weight:
                    module.forward = _forward(name, module, rows, self.ids, ids_K, alone=among is not None)
                    self._modules.append(module)
            self.parameters[table + ROWS] = rows
            self._weights[table + ROWS] = (weight, ids_K)

    @property
    def names(self) -> list[str]:
        """The modules that have the rows, a tied one by its first name."""
        return [key.removesuffix(ROWS) for key in self.parameters]

    @torch.no_grad()
    def publish(self) -> None:
        """Put the rows where the model computes with them."""
        for name, (weight, ids_K) in self._weights.items():
            weight.index_copy_(0, ids_K, self.parameters[name].detach())

    def unload(self) -> None:
        """Give the modules their own backward again; the rows stay in their weights."""
        for module in self._modules:
            del module.forward
        self._modules = []


def tables(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that have a row for every token, by the name of the first module that has it."""
    found: dict[str, Tensor] = {}
    for anchor in (model.get_input_embeddings(), model.get_output_embeddings()):
        if anchor is not None and not any(anchor.weight is weight for weight in found.values()):
            name = next(n for n, module in model.named_modules() if module._parameters.get("weight") is anchor.weight)
            found[name] = anchor.weight
    return found


def sole_embedding(model: PreTrainedModel) -> str | None:
    """The name of the embedding of tokens, if it computes as torch's does, no other module has its weight, and what it
    reads are rows as they are encoded, to which decoders of their own add a first token."""
    embedding = model.get_input_embeddings()
    owners = [name for name, module in model.named_modules() if module._parameters.get("weight") is embedding.weight]
    if model.config.is_encoder_decoder or len(owners) > 1 or type(embedding).forward is not nn.Embedding.forward:
        return None
    is_plain = embedding.max_norm is None and not embedding.scale_grad_by_freq and not embedding.sparse
    return owners[0] if is_plain else None


def misfits(model: PreTrainedModel, indices: Mapping[str, Sequence[int]], saved: Mapping[str, Tensor]) -> list[str]:
    """Why the rows of an adapter's file do not fit a model, in words. `indices`: the tokens by module."""
    rows = {name: tensor for name, tensor in saved.items() if name.endswith(ROWS)}
    if not indices:
        return [f"{name}, and the config names no token" for name in rows]
    tokens = {tuple(ids) for ids in indices.values()}
    ids = min(tokens)
    problems = ["rows of embedding and head are for different tokens"] if len(tokens) > 1 else []
    expected = {name + ROWS: (len(ids), weight.shape[1]) for name, weight in tables(model).items()}
    num_rows = min(len(weight) for weight in tables(model).values())
    if max(ids, default=0) >= num_rows:
        problems.append(f"rows for token {max(ids)}, and the model has {num_rows}: its embedding has to grow first")
    for name in sorted(expected.keys() ^ rows.keys()):
        problems.append(f"{'no' if name in expected else 'unknown'} {name}")
    for name in expected.keys() & rows.keys():
        if tuple(rows[name].shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(rows[name].shape)}, expected {expected[name]}")
    return problems


def _forward(name: str, module: nn.Module, rows: Tensor, ids: tuple[int, ...], ids_K: Tensor, *, alone: bool) -> Any:
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return partial(_head, module, rows, ids_K)
    scale = 1.0 if type(module).forward is nn.Embedding.forward else _scale(module)
    if not isinstance(module, nn.Embedding) or scale is None:
        raise RecipeError(
            f"data.new_tokens: {name} computes in its own way, of which rows cannot be trained alone. Train it whole: "
            f"method.also_train: {name.rpartition('.')[2]}"
        )
    places_V = torch.full((module.num_embeddings,), len(ids), device=ids_K.device)
    places_V[ids_K] = torch.arange(len(ids), device=ids_K.device)
    padding = ids.index(module.padding_idx) if module.padding_idx in ids else -1
    return partial(_embed, module, rows, places_V, _Table(scale, padding, alone=alone))


def _scale(module: nn.Module) -> float | None:
    """What an embedding is multiplied by, as Gemma's; None: not known."""
    scale = getattr(module, "embed_scale", None)
    return None if scale is None else float(scale)


@dataclass(frozen=True, slots=True)
class _Table:
    """How an embedding computes."""

    scale: float
    padding: int
    """The place of the row that never learns; -1: there is none."""
    alone: bool
    """A gradient of any other row would be lost, and is an error."""


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
        # What torch's own embedding does, so that each row's sum is taken in the same order; the last is of no row.
        grads = torch.ops.aten.embedding_dense_backward(g.float(), places, num_rows + 1, table.padding, False)
        grad_KD, lost_D = grads[:num_rows], grads[num_rows]
        if table.alone and not is_fake(lost_D) and bool(lost_D.any()):
            raise ModelError("a token learns whose row of the embedding is not trained: this is an error of Tunesmith")
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
