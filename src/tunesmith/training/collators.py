"""The micro-batches of training rows and of held-out rows for a loaded model, with shared prefixes computed once where
the model gives the same answers and gradients then."""

# N positions, D hidden size, T tokens, P tokens of the prefix

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.collate import Collator, Masking, build_batch, pads_to_multiple
from tunesmith.data.prefixes import share_prefixes
from tunesmith.data.sampler import StepSampler
from tunesmith.data.splits import Splits
from tunesmith.inference.load import has_token_types
from tunesmith.models.forward import hidden_states
from tunesmith.models.modes import eval_mode
from tunesmith.models.packing_check import PROBE_TOKENS, TOLERANCES
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.models.special_tokens import pad_id
from tunesmith.planning.prefixes import KEY, shared_prefixes
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.training.inputs import Inputs
from tunesmith.training.resolve import decide_sharing_for
from tunesmith.types import Batch, Choice, Row


def collators(
    recipe: Recipe, inputs: Inputs, rows: Splits, model: PreTrainedModel, plan: StepSampler, *, device: str
) -> tuple[Collator, Collator, list[Choice]]:
    """The collators of training rows and of held-out rows, and what was decided for them.

    Held-out rows are masked by one seed in all runs, so that their metrics can be compared, and each is computed whole,
    as in a later evaluation of the result.
    """
    tokenizer = inputs.renderer.tokenizer
    masks = inputs.head == "masked_token"
    choice = decide_sharing_for(recipe, inputs, rows, model, plan)
    if choice is not None and choice.value:
        shared = shared_prefixes(plan, rows.store)
        if problem := disagreement(model, shared.probe):
            what = f"rows of a step begin alike: {shared.saved:.0%} of their tokens"
            choice = Choice(KEY, False, f"{what} could be computed once, but the model then {problem}")

    def collator(store: Any, seed: int, *, shares: bool) -> Collator:
        return Collator(
            store,
            layout=plan.layout,
            device=device,
            masking=Masking.of(tokenizer, share=recipe.train.masked, seed=seed) if masks else None,
            decoder_start=getattr(model.config, "decoder_start_token_id", None),
            has_types=has_token_types(model, tokenizer),
            pad_id=pad_id(model, tokenizer),
            shares=shares,
            pads=pads_to_multiple(plan.layout, device=torch.device(device).type, precision=resolved(recipe.precision)),
        )

    shares = choice is not None and bool(choice.value)
    choices = [] if choice is None else [choice]
    return collator(rows.store, recipe.seed, shares=shares), collator(rows.held_store, 0, shares=False), choices


def disagreement(model: PreTrainedModel, rows: Sequence[Row]) -> str | None:
    """Name the difference if the prefix of these rows is shared: hidden states, or its gradient; None: nothing."""
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
    """The row with every token as a target."""
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
