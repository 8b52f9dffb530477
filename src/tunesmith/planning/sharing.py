"""Whether what rows of a step begin with alike is computed once: asked of the rows, the recipe and the model itself."""

# N positions, D hidden size, T tokens, P tokens of the beginning

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.collate import build_batch
from tunesmith.data.dataset import RowStore
from tunesmith.data.prefix_sharing import prefix_groups, share_prefixes
from tunesmith.data.sampler import StepSampler
from tunesmith.methods.peft import randomness
from tunesmith.models.attention import UnsupportedAttentionError
from tunesmith.models.forward import hidden_states
from tunesmith.models.modes import eval_mode
from tunesmith.models.packing_check import PROBE_TOKENS, TOLERANCES
from tunesmith.recipe.methods import PeftMethod
from tunesmith.recipe.schema import Recipe
from tunesmith.types import Batch, Choice, Row

LEAST_SAVED = 0.05
"""Share of the tokens below which a piece more in every pass is not worth its while."""
PROBE_STEPS = 4
PROBE_ROWS = 3
KEY = "kernels.shared_beginnings"
Ask = Callable[[PreTrainedModel, Sequence[Row]], str | None]
"""What is wrong with a model's answers where rows share what they begin with; None: nothing."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How much rows share."""

    saved: float
    """Of all tokens of the first steps the share that need not be computed."""
    probe: tuple[Row, ...]
    """Some rows that begin alike."""


def decide_sharing(model: PreTrainedModel, recipe: Recipe, plan: StepSampler, store: RowStore, *, ask: Ask) -> Choice:
    """For packed batches of a causal model without token types. `ask`: `disagreement`, or what stands for it where
    there is no model yet."""
    sharing = look(plan, store)
    if sharing.saved < LEAST_SAVED:
        return Choice(KEY, False, f"what rows of a step begin with alike is {sharing.saved:.0%} of their tokens")
    what = f"rows of a step begin alike: {sharing.saved:.0%} of their tokens"
    if recipe.kernels == "plain":
        return Choice(KEY, False, f"{what} could be computed once, but kernels: plain leaves them")
    if drawn := _draws(model, recipe):
        return Choice(KEY, False, f"{what} could be computed once, but {drawn} draws anew for each row")
    if problem := ask(model, sharing.probe):
        return Choice(KEY, False, f"{what} could be computed once, but the model then {problem}")
    return Choice(KEY, True, f"{what} are computed once for all; counted are the tokens of the rows")


def look(plan: StepSampler, store: RowStore) -> Sharing:
    """What the first steps share: a function of the plan alone."""
    plan = filled_by(plan, store)
    tokens, computed = 0, 0
    probe: tuple[Row, ...] = ()
    for step in range(1, min(PROBE_STEPS, plan.steps_per_epoch) + 1):
        for members in plan.step(step):
            rows = [store.row(i) for i in members]
            tokens += sum(len(row.ids) for row in rows)
            for family in prefix_groups([row.ids for row in rows]):
                computed += family.prefix + sum(len(rows[i].ids) - family.prefix for i in family.members)
                if family.prefix and not probe:
                    probe = tuple(rows[i] for i in family.members[:PROBE_ROWS])
    return Sharing(1 - computed / tokens, probe)


def filled_by(plan: StepSampler, store: RowStore) -> StepSampler:
    """The same steps, in passes filled by what is computed where beginnings are shared."""
    return replace(plan, ids_of=lambda index: store.row(index).ids)


def _draws(model: PreTrainedModel, recipe: Recipe) -> str | None:
    """What is random in the forward pass; None: nothing is."""
    if recipe.loss.neftune_alpha:
        return "loss.neftune_alpha"
    if getattr(recipe.method, "dropout", 0):
        return "method.dropout"
    if isinstance(recipe.method, PeftMethod) and (drawn := randomness(recipe.method)):
        return drawn
    settings = model.config.get_text_config().to_dict().items()
    inside = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if inside or any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings):
        return "the model's dropout"
    return None


def disagreement(model: PreTrainedModel, rows: Sequence[Row]) -> str | None:
    """Compare what the model makes of a few rows, and the gradient that reaches the embeddings of their beginning, both
    ways; what is wrong, or None."""
    rows = [Row(row.ids[:PROBE_TOKENS], row.trained[:PROBE_TOKENS], row.source) for row in rows]
    plain = build_batch([_whole(row) for row in rows], range(len(rows)), layout="packed", device=model.device)
    shared = share_prefixes(plain, [row.ids for row in rows])
    prefix = shared.pieces[0].tokens
    with eval_mode(model), torch.enable_grad():
        hidden, grad = _answer(model, plain, prefix)
        try:
            shared_hidden, shared_grad = _answer(model, shared, prefix)
        except (UnsupportedAttentionError, RuntimeError) as refusal:
            return f"refuses ({refusal})"
    away = float((hidden - shared_hidden).norm() / (hidden - hidden.mean(0)).norm())
    if not away <= TOLERANCES[model.dtype]:
        return f"answers otherwise, by {away:.3g} of the spread"
    away = float((grad - shared_grad).norm() / grad.norm())
    if not away <= TOLERANCES[model.dtype]:
        return f"learns otherwise, by {away:.3g} of the gradient"
    return None


def _whole(row: Row) -> Row:
    """Every token of it is looked at."""
    trained = row.trained.copy()
    trained[:] = True
    return Row(row.ids, trained, row.source)


def _answer(model: PreTrainedModel, batch: Batch, prefix: int) -> tuple[Tensor, Tensor]:
    """[N, D] at the targets, and [P, D], the gradient at the first P positions, summed over the rows; float32."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        hidden_ND = hidden_states(model, batch)[batch.predict_N].float()
    finally:
        hook.remove()
    weights_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(0)).to(hidden_ND)
    (grad_1TD,) = torch.autograd.grad(hidden_ND, embedded, weights_ND)
    sums_TD = grad_1TD.new_zeros(max(batch.lengths), grad_1TD.shape[-1], dtype=torch.float32)
    sums_TD.index_add_(0, batch.positions_BT[0], grad_1TD[0].float())
    return hidden_ND.detach(), sums_TD[:prefix]
