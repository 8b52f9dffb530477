"""The gradients of one step, micro-batch by micro-batch; smaller ones if memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.data.sampler import MicroBatch, StepSampler, copies_in
from tunesmith.errors import OutOfMemoryError, is_out_of_memory
from tunesmith.models.machine import free_cached_memory, peak_memory_bytes
from tunesmith.training.state import TrainState


@dataclass(frozen=True)
class StepGradients:
    """The result of a step's forward and backward passes; the gradients themselves are in the attachment."""

    plan: StepSampler
    """The plan for the next step: with smaller micro-batches if memory ran out."""
    passes: list[MicroBatch]
    losses: list[Tensor]
    """Loss sum of each micro-batch."""
    penalty: float | None
    """The method's addition to the loss of the step; None: nothing."""
    num_targets: float
    computed: int
    halved: bool


def compute_gradients(state: TrainState, plan: StepSampler, step: int) -> StepGradients:
    """Run forward and backward for every micro-batch of a step.

    If memory runs out, all of them run again with micro-batches half as large: the same rows, and the same loss
    divided by the same number of targets.
    """
    halved = False
    while True:
        passes = plan.step(step)
        num_targets = sum(float(state.store.denominators[i]) for rows in passes for i in rows)
        torch.manual_seed(_step_seed(state.recipe.seed, step))
        losses: list[Tensor] = []
        computed = 0
        try:
            for rows, copies in zip(passes, copies_in(passes), strict=True):
                loss_sum, tokens = _pass(state, rows, copies, step, num_targets)
                losses.append(loss_sum)
                computed += tokens
            return StepGradients(plan, passes, losses, _penalise(state), num_targets, computed, halved)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback holds the tensors of the pass.
        _drop_gradients(state)
        if all(len(rows) == 1 for rows in passes):
            raise _exhausted(state, step, plan.lengths_of(passes[len(losses)]))
        largest = max(map(plan.computed, passes))
        # Never more than before: a row longer than the limit is a micro-batch of its own.
        plan, halved = replace(plan, tokens_per_pass=max(1, min(largest, plan.tokens_per_pass) // 2)), True


def _pass(
    state: TrainState, rows: MicroBatch, copies: Sequence[int], step: int, num_targets: float
) -> tuple[Tensor, int]:
    """Run forward and backward; return the loss sum and the number of computed positions."""
    batch = state.feed.batch(rows, draw=step, copies=copies)
    with state.noise.on(state.model, batch, step):
        loss_sum = state.task.loss_sum(state.model, batch)
    (loss_sum / num_targets).backward()  # type: ignore[no-untyped-call]
    state.attachment.collect_gradients()
    return loss_sum.detach(), batch.num_computed


def _penalise(state: TrainState) -> float | None:
    """Add the gradient of the method's penalty: once a step, however many micro-batches there are."""
    if state.attachment.step_hook is None:
        return None
    penalty = state.attachment.step_hook.penalty()
    penalty.backward()  # type: ignore[no-untyped-call]
    return float(penalty.detach())


def _drop_gradients(state: TrainState) -> None:
    state.optimizer.zero_grad()
    for parameter in state.model.parameters():
        parameter.grad = None
    free_cached_memory()


def _exhausted(state: TrainState, step: int, lengths: list[int]) -> OutOfMemoryError:
    state.optimizer.eval_mode()
    state.attachment.publish()
    peak = peak_memory_bytes(state.device)
    return OutOfMemoryError(
        f"step {step}: out of memory in a micro-batch of one row of {lengths[0]:,} tokens; {peak / 2**30:.2f} GiB were "
        "allocated at most. The update was not made.",
        step=step,
        lengths=lengths,
        peak=peak,
    )


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 0x9E3779B97F4A7C15) % 2**63
