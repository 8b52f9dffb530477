"""The gradients of one step, micro-batch by micro-batch; smaller ones if memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tunesmith.data.collate import LinesOf
from tunesmith.data.sampler import MicroBatch, StepSampler, copies_in
from tunesmith.errors import GroupError, OutOfMemoryError, WayOut, is_out_of_memory
from tunesmith.models.memory import free_cached_memory, peak_memory_bytes
from tunesmith.optim import gradient_norm
from tunesmith.parallel.exchange import Computed, Exhausted
from tunesmith.phrases import set_words, size
from tunesmith.training.state import TrainState
from tunesmith.types import Batch, LossSum


@dataclass(frozen=True)
class StepGradients:
    """The result of this process's forward and backward passes of a step; its
    gradients are in the attachment."""

    sampler: StepSampler
    """The sampler of the next step: with smaller micro-batches if memory ran out."""
    computed: Computed
    """The part of this process alone."""
    num_targets: float
    """Targets of the whole step."""
    norm: float | None = None
    """Norm of the gradients as they are now, where it is known already."""


def compute_gradients(state: TrainState, sampler: StepSampler, step: int) -> StepGradients:
    """Run forward and backward for every micro-batch of this process's part of a step.

    If memory runs out, all of them run again with micro-batches half as large: the same rows, and the same loss
    divided by the same number of targets. If it does so in a micro-batch of one row,
    `exhausted` says so and all gradients are dropped.
    """
    num_targets = sum(float(state.store.denominators[i]) for i in sampler.rows(step))
    halved, loss_of = False, None
    while True:
        passes, idle = sampler.step(step), sampler.idle(step)
        losses: list[Tensor] = []
        of_rows: list[Tensor] = []
        num_computed = 0
        try:
            # 1. The loss of the step. Together, all ranks look at its rows once, whichever runs out of memory.
            if loss_of is None or state.world.size == 1:
                loss_of = step_loss(state, passes, step)
            # 2. Forward and backward of each micro-batch; idle ones keep pace with other ranks and count nothing.
            torch.manual_seed(_step_seed(state.recipe.seed, step, sampler.part[0]))
            for batch in _batches(state, [*passes, *idle], step, "learnt"):
                divisor = num_targets if len(losses) < len(passes) else math.inf
                losses.append(_pass(state, batch, divisor, loss_of))
                of_rows += _by_row(batch) if len(losses) <= len(passes) else []
                num_computed += batch.num_computed
            # 3. The sums are read, and in float16 the step is made anew where its gradients overflowed.
            state.loss_scale.undo(state.attachment.trained.values())
            sums, rows, norm = _read(state, losses[: len(passes)], of_rows)
            if norm is not None and all(map(math.isfinite, sums)) and state.loss_scale.gives_way(norm):
                drop_gradients(state)
                continue
            computed = _rank_result(state, sampler, passes, sums, num_computed, halved=halved)
            return StepGradients(sampler, replace(computed, row_losses=rows), num_targets, norm)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if state.world.is_sharded:  # other ranks wait inside the pass, which cannot be made anew
                way = _smaller(sampler)
                raise GroupError(
                    f"step {step}: out of memory on rank {state.world.rank}, and the layers are split over the "
                    f"devices: the others cannot go on. Resume with {set_words(way.settings)}.",
                    ways=[way],
                ) from error
        # 4. Memory ended. Outside of the handler, whose traceback holds the tensors of the pass.
        drop_gradients(state)
        if all(len(rows) == 1 for rows in passes):
            nothing = _rank_result(state, sampler, [], [], 0, halved=halved)
            longest = sampler.lengths_of(passes[min(len(losses), len(passes) - 1)])[0]
            exhausted = Exhausted(longest, nothing.peak)
            return StepGradients(sampler, replace(nothing, exhausted=exhausted), num_targets)
        largest = max(map(sampler.computed, passes))
        # Never more than before: a row longer than the limit is a micro-batch of its own.
        sampler, halved = replace(sampler, tokens_per_pass=max(1, min(largest, sampler.tokens_per_pass) // 2)), True


def _by_row(batch: Batch) -> list[Tensor]:
    """[B] float32, the loss of each row of a pass, summed over its targets; none
    where the task gives one sum alone."""
    zeros_B = batch.row_of_N.new_zeros(len(batch.row_indices), dtype=torch.float32)
    return [zeros_B.index_add(0, batch.row_of_N, losses_N.float()) for losses_N in batch.losses[:1]]


def _read(
    state: TrainState, losses: list[Tensor], of_rows: list[Tensor]
) -> tuple[list[float], list[float], float | None]:
    """The loss sums, the rows' losses, and the norm of gradients where it is read with them: a
    CUDA device is waited for once."""
    if not losses:
        return [], [], None
    norms: list[Tensor] = []
    if losses[0].device.type == "cuda" or state.loss_scale.value != 1:
        gradients = [tensor.grad for tensor in state.attachment.trained.values() if tensor.grad is not None]
        norms = [torch.nn.utils.get_total_norm(gradients).to(losses[0])]
    sums = torch.stack([*losses, *norms])
    read = torch.cat([sums, *(rows.to(sums) for rows in of_rows)]).cpu().double().tolist()
    return read[: len(losses)], read[len(sums) :], read[len(losses)] if norms else None


def _rank_result(
    state: TrainState, sampler: StepSampler, passes: list[MicroBatch], losses: list[float], num: int, *, halved: bool
) -> Computed:
    return Computed(
        micro_batches=passes,
        losses=losses,
        targets=sum(float(state.store.denominators[i]) for rows in passes for i in rows),
        computed=num,
        peak=peak_memory_bytes(state.device),
        tokens_per_pass=sampler.tokens_per_pass if halved else None,
    )


def _batches(state: TrainState, passes: list[MicroBatch], step: int, lines: LinesOf) -> Iterator[Batch]:
    for rows, copies in zip(passes, copies_in(passes), strict=True):
        yield state.collator.batch(rows, step=step, copies=copies, lines=lines)


def step_loss(state: TrainState, passes: list[MicroBatch], step: int) -> LossSum:
    """The task's loss of these passes, after a pass over their rows with the random numbers that these draw."""
    if state.task.prepass is None:
        return state.task.loss_sum
    torch.manual_seed(_step_seed(state.recipe.seed, step, state.sampler.part[0]))
    with torch.no_grad():
        return state.task.prepass(state.model, _batches(state, passes, step, "partners"), state.world)


def _pass(state: TrainState, batch: Batch, num_targets: float, loss_of: LossSum) -> Tensor:
    """Run forward and backward; return the loss sum."""
    loss_sum = loss_of(state.model, batch)
    state.loss_scale.scaled(loss_sum, num_targets).backward()  # type: ignore[no-untyped-call]
    state.attachment.collect_gradients()
    return loss_sum.detach()


def drop_gradients(state: TrainState) -> None:
    """Drop every gradient of a step that is not made, and the memory of it."""
    state.optimizer.zero_grad()
    for parameter in state.model.parameters():
        parameter.grad = None
    free_cached_memory()


def exhausted_error(state: TrainState, step: int, found: Exhausted) -> OutOfMemoryError:
    """The error for a micro-batch of one row that does not fit. The weights are as after the step before."""
    drop_gradients(state)
    where = f" on rank {found.rank}" if state.world.size > 1 else ""
    return OutOfMemoryError(
        f"step {step}: out of memory{where} in a micro-batch of one row of {found.tokens:,} tokens; "
        f"{size(found.peak)} were allocated at most. The update was not made.",
        step=step,
        lengths=[found.tokens],
        peak=found.peak,
    )


def rehearse(state: TrainState, rows: MicroBatch, *, times: int) -> None:
    """Forward and backward of one micro-batch on every rank, `times` times, without an update: where layers are
    split, memory that ends inside a step cannot be made good, so the heaviest is tried before the first.

    Raises GroupError where it ends.
    """
    state.model.train()  # in which layers are recomputed
    try:
        torch.manual_seed(0)
        for batch in _batches(state, [rows] * times, 1, "learnt"):
            _pass(state, batch, math.inf, state.task.loss_sum)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        way = _smaller(state.sampler)
        raise GroupError(
            f"before the first step: out of memory on rank {state.world.rank} in the heaviest pass, of "
            f"{sum(state.sampler.lengths_of(rows)):,} tokens. The layers are split over the devices, so a step "
            f"that fails could not be made again. Resume with {set_words(way.settings)}.",
            ways=[way],
        ) from error
    finally:
        drop_gradients(state)


def _smaller(sampler: StepSampler) -> WayOut:
    return WayOut({"train.tokens_per_pass": max(1, sampler.tokens_per_pass // 2)})


def step_norm(state: TrainState) -> float:
    """Norm of the gradients of a step: of those that every rank has, and of the
    pieces that each has of others."""
    attachment = state.attachment
    norm = gradient_norm(attachment.shared.values())
    if not attachment.shards:
        return norm
    pieces = gradient_norm(attachment.trained[name] for name in attachment.shards)
    return math.hypot(norm, *state.world.gather_values(pieces))


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 0x9E3779B97F4A7C15 + rank * 0xD1B54A32D192ED03) % 2**63
