"""Decide whether the prefix that rows of a step share is computed once: by rows, recipe, and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.branches import lines_of
from tunesmith.data.collate import build_batch
from tunesmith.data.dataset import RowStore
from tunesmith.data.prefixes import prefix_keys, share_prefixes, stretches
from tunesmith.data.sampler import StepSampler
from tunesmith.inference.load import has_token_types
from tunesmith.methods import METHODS
from tunesmith.models.forward import hidden_at_targets
from tunesmith.models.modes import eval_mode
from tunesmith.models.packing_check import PROBE_TOKENS, TOLERANCES
from tunesmith.models.segments import UnsupportedAttentionError
from tunesmith.phrases import percent
from tunesmith.recipe.methods import MethodOptions
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.tasks import TASKS
from tunesmith.training.inputs import Inputs
from tunesmith.training.packed_rows import MOST_PROBED
from tunesmith.types import LEAST_PREFIX, Batch, BatchImage, Choice, Row

LEAST_SAVED = 0.05
"""Share of the tokens that has to be saved: each shared prefix is one more piece of a micro-batch."""
PROBE_STEPS, PROBE_ROWS = 4, 3
KEY = "shared_prefixes"
"""Name of the decision in the plan; it is no option: `kernels: plain` turns it off."""


@dataclass(frozen=True, slots=True)
class CommonPrefixes:
    """Tokens that rows share."""

    saved: float
    """Share of the tokens of the first steps that need not be computed."""
    probe: tuple[Row, ...]
    """Some rows with a common prefix."""


def shared_prefixes(sampler: StepSampler, store: RowStore, image_token: int | None) -> CommonPrefixes:
    """Tokens shared by rows of the first steps, whoever computes them: a function of the sampler alone."""
    sampler = with_shared_prefixes(replace(sampler, part=(0, 1)), store, image_token)
    tokens, computed = 0, 0
    probe: tuple[Row, ...] = ()
    for step in range(1, min(PROBE_STEPS, sampler.steps_per_epoch) + 1):
        for members in sampler.step(step):
            rows = [line for i in members for line in lines_of(store.row(i))]
            tokens += sum(len(row.ids) for row in rows)
            for stretch in stretches([prefix_keys(row, image_token) for row in rows]):
                computed += stretch.stop - stretch.start
                if len(stretch.members) > 1 and not probe:
                    probe = tuple(rows[i] for i in stretch.members[:PROBE_ROWS])
    return CommonPrefixes(1 - computed / tokens, probe)


def _of_answers(sampler: StepSampler, store: RowStore, num: int) -> CommonPrefixes:
    """Answers to a prompt that are to be drawn, played by its own last tokens."""
    longest = store.row(int(sampler.rows_I[np.argmax(sampler.lengths_I)]))
    ids_T = longest.ids
    if len(ids_T) < LEAST_PREFIX:
        return CommonPrefixes(0.0, ())
    answers = [np.concatenate([ids_T, np.roll(ids_T, at)[:LEAST_PREFIX]]) for at in range(1, PROBE_ROWS + 1)]
    rows = tuple(Row(ids, np.ones(len(ids), np.bool_), longest.source) for ids in answers)
    return CommonPrefixes(1 - 1 / num, rows)


def decide_sharing(
    recipe: Recipe, inputs: Inputs, store: RowStore, model: PreTrainedModel, sampler: StepSampler
) -> Choice | None:
    """Whether shared prefixes are computed once; None where they cannot be: only in packed batches of a causal
    model without token types. A model with weights must answer and learn the same too."""
    if (
        inputs.kind != "causal"
        or inputs.head == "vector"
        or sampler.layout != "packed"
        or has_token_types(model, inputs.renderer.tokenizer)
    ):
        return None
    task, image_token = TASKS[resolved(recipe.task)], image_token_of(inputs, store)
    if task.samples:
        shared = _of_answers(sampler, store, recipe.reinforce.samples)
    else:
        shared = shared_prefixes(sampler, store, image_token)
    if shared.saved < LEAST_SAVED:
        return Choice(
            KEY, False, f"beginnings that rows of a step share are only {percent(shared.saved, 0)} of their tokens"
        )
    what = f"rows of a step share their beginnings, {percent(shared.saved, 0)} of their tokens"
    if task.samples:
        what = "answers to a prompt share its tokens, which"
    problem = ""
    if recipe.kernels == "plain":
        problem = "kernels: plain leaves them"
    elif not task.compares and not task.samples and (random := random_option(model, recipe.method)):
        problem = f"{random} draws anew for each row"
    elif store.images is not None and hasattr(model.base_model, "get_rope_index"):
        problem = "this model counts positions by the images of whole rows"
    elif model.device.type != "meta":
        images: tuple[BatchImage, ...] = ()
        if store.images is not None:
            of_rows = [[store.images[number] for number in row.images] for row in shared.probe]
            images = inputs.renderer.batch_images(of_rows)
        if difference := disagreement(model, shared.probe, images, image_token):
            problem = f"the model then {difference}"
    if problem:
        return Choice(KEY, False, f"{what} could be computed once, but {problem}")
    return Choice(KEY, True, f"{what} are computed once for all; counted are the tokens of the rows")


def image_token_of(inputs: Inputs, store: RowStore) -> int | None:
    """The token in the places of images; None: no row has one."""
    placeholders = inputs.renderer.placeholders
    return None if store.images is None or placeholders is None else placeholders.token_id


def with_shared_prefixes(sampler: StepSampler, store: RowStore, image_token: int | None) -> StepSampler:
    """The sampler of the same steps, whose micro-batches are filled by the tokens that are computed when shared
    prefixes are computed once."""
    return replace(sampler, keys_of=lambda index: prefix_keys(store.row(index), image_token))


def random_option(model: nn.Module, method: MethodOptions) -> str | None:
    """The option that makes a forward pass random in training; None: none does."""
    if option := METHODS[method.name].randomness(method):
        return option
    settings = model.config.get_text_config().to_dict().items()  # type: ignore[union-attr,operator]
    inside = any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    if inside or any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings):
        return "the model's dropout"
    return None


def disagreement(
    model: PreTrainedModel, rows: Sequence[Row], images: tuple[BatchImage, ...] = (), image_token: int | None = None
) -> str | None:
    """Name the difference if these rows' prefix is shared: hidden states, or its gradient; None: nothing.

    `images`: of the rows, which are read whole then.
    """
    most = MOST_PROBED if images else PROBE_TOKENS
    if images and (longest := max(len(row.ids) for row in rows)) > most:
        return f"cannot be tried on rows of {longest:,} tokens with images"
    # With every token as a target.
    rows = [Row(ids := row.ids[:most], np.ones(len(ids), np.bool_), row.source, images=row.images) for row in rows]
    plain = build_batch(rows, range(len(rows)), layout="packed", device=model.device)
    plain = replace(plain, images=images)
    shared = share_prefixes(plain, rows, image_token=image_token)
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


def _answer(model: PreTrainedModel, batch: Batch, prefix: int) -> tuple[Tensor, Tensor]:
    """[N, D] at the targets, and [P, D], the gradient at the first P positions, summed over rows; float32."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    with model.get_input_embeddings().register_forward_hook(keep):
        hidden_ND = hidden_at_targets(model, batch).float()
    weights_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(0)).to(hidden_ND)
    (grad_1TD,) = torch.autograd.grad(hidden_ND, embedded, weights_ND)
    sums_TD = grad_1TD.new_zeros(max(batch.lengths), grad_1TD.shape[-1], dtype=torch.float32)
    sums_TD.index_add_(0, batch.positions_BT[0], grad_1TD[0].float())
    return hidden_ND.detach(), sums_TD[:prefix]
