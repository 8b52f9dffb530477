"""The gradients of one step, pass by pass; with smaller passes where memory ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.data.batch import Plan
from tunesmith.data.passes import Pass, copies_in
from tunesmith.errors import OutOfMemoryError, is_out_of_memory
from tunesmith.models.exhausted import give_back
from tunesmith.training.setup import Setup
from tunesmith.training.summary import peak_memory_bytes


@dataclass(frozen=True)
class Gradients:
    """The gradients of a step have been added up."""

    plan: Plan
    """With smaller passes than before if memory asked for them."""
    passes: list[Pass]
    losses: list[Tensor]
    """Of each pass its loss sum."""
    penalty: float | None
    """What the method adds to the loss of the step; None: nothing."""
    num_targets: float
    computed: int
    halved: bool


def gradients(setup: Setup, plan: Plan, step: int) -> Gradients:
    """Forward and backward of every pass of a step. Where memory ends, all of them again from nothing with passes half
    as large: the same rows, and the same loss divided by the same number."""
    halved = False
    while True:
        passes = plan.step(step)
        num_targets = sum(float(setup.rows.store.denominators[i]) for rows in passes for i in rows)
        torch.manual_seed(_step_seed(setup.recipe.seed, step))
        losses: list[Tensor] = []
        computed = 0
        try:
            for rows, copies in zip(passes, copies_in(passes), strict=True):
                loss_sum, tokens = _pass(setup, rows, copies, step, num_targets)
                losses.append(loss_sum)
                computed += tokens
            return Gradients(plan, passes, losses, _penalise(setup), num_targets, computed, halved)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds the tensors of the pass.
        _drop_gradients(setup)
        if all(len(rows) == 1 for rows in passes):
            raise _exhausted(setup, step, plan.lengths_of(passes[len(losses)]))
        largest = max(map(plan.computed, passes))
        # Never more than before: a long row goes alone, whatever is said of passes.
        plan, halved = replace(plan, tokens_per_pass=max(1, min(largest, plan.tokens_per_pass) // 2)), True


def _pass(setup: Setup, rows: Pass, copies: Sequence[int], step: int, num_targets: float) -> tuple[Tensor, int]:
    """Forward and backward; the loss sum, and the places that were computed."""
    batch = setup.feed.batch(rows, draw=step, copies=copies)
    with setup.noise.on(setup.model, batch, step):
        loss_sum = setup.task.loss_sum(setup.model, batch)
    (loss_sum / num_targets).backward()  # type: ignore[no-untyped-call]
    setup.attachment.collect_gradients()
    return loss_sum.detach(), batch.num_computed


def _penalise(setup: Setup) -> float | None:
    """Add the gradient of what the method adds to the loss: after the passes, so once however many they are."""
    if setup.attachment.step_hook is None:
        return None
    penalty = setup.attachment.step_hook.penalty()
    penalty.backward()  # type: ignore[no-untyped-call]
    return float(penalty.detach())


def _drop_gradients(setup: Setup) -> None:
    setup.update.drop_gradients()
    for parameter in setup.model.parameters():
        parameter.grad = None
    give_back()


def _exhausted(setup: Setup, step: int, lengths: list[int]) -> OutOfMemoryError:
    setup.update.rest()
    setup.attachment.publish()
    peak = peak_memory_bytes(setup.device)
    return OutOfMemoryError(
        f"step {step}: memory ended in a pass of one row of {lengths[0]:,} tokens; {peak / 2**30:.2f} GiB were held at "
        "most. The update was not made.",
        step=step,
        lengths=lengths,
        peak=peak,
    )


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 0x9E3779B97F4A7C15) % 2**63
