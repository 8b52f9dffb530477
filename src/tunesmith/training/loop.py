"""The training loop.

A generator that makes one optimizer update a turn and knows nothing of folders, progress or saving. Task,
method and optimizer enter as values; nothing else in this package takes an optimizer step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace

from tunesmith.data.sampler import MicroBatch, StepSampler
from tunesmith.errors import NonFiniteError
from tunesmith.models.memory import peak_memory_bytes
from tunesmith.optim import clip_divisor, rate
from tunesmith.parallel.exchange import Computed, meet
from tunesmith.phrases import listed
from tunesmith.training.state import Drawn, TrainState
from tunesmith.training.step import StepGradients, compute_gradients, drop_gradients, exhausted_error, step_norm
from tunesmith.types import Event, LossSum


def training_steps(state: TrainState, *, start: int = 0, loss: LossSum | None = None) -> Iterator[Event]:
    """Yield one "step" event for every optimizer update after step `start`.

    Between two events the model is consistent: it may be measured or saved, and `break` leaves it whole.
    The loss of a step is the sum over its targets, of all processes, divided once by their number. torch's
    generator is seeded at every step from seed, step and rank: nothing done between steps changes the next.

    Args:
        state: what `tunesmith.prepare` returns.
        start: the steps that were taken already.
        loss: in place of the task's: called with the model and a `Batch`, it returns the sum of the losses of
            its targets, a scalar with a gradient. It must not divide: the loop does, by the targets of the step.

    Raises:
        NonFiniteError: a loss or gradient is not finite; the update was not made.
        OutOfMemoryError: a micro-batch of one row does not fit; the weights are as after the step before.

    Examples:
        >>> for event in tunesmith.training_steps(setup):
        ...     print(event.step, event.values["loss"])
        >>> def loss(model, batch):
        ...     logits_NV = logits_at_targets(model, batch).float()
        ...     return torch.nn.functional.cross_entropy(logits_NV, batch.targets_N, reduction="sum")
    """
    if loss is not None:
        state = replace(state, task=replace(state.task, loss_sum=loss, prepass=None))
    recipe, sampler, attachment, optimizer = state.recipe, state.sampler, state.attachment, state.optimizer
    for step in range(start + 1, state.total_steps + 1):
        started = time.perf_counter()
        if not state.model.training:  # train() walks over all modules: as long as some layers of a small model
            state.model.train()
        drawn = _drawn(replace(state, sampler=sampler), step)
        done, met = _computed(drawn.state, drawn.state.sampler, step)
        if met.exhausted is not None:
            raise exhausted_error(drawn.state, step, met.exhausted)
        smaller, left = met.tokens_per_pass, met.tokens_per_pass or done.sampler.tokens_per_pass
        sampler = sampler if left == sampler.tokens_per_pass else replace(sampler, tokens_per_pass=left)
        lr = rate(step, state.total_steps, recipe.optim)
        grad_norm = step_norm(state) if done.norm is None or state.world.size > 1 else done.norm
        _require_finite(drawn.state, step, passes=met.micro_batches, losses=met.losses, grad_norm=grad_norm, lr=lr)
        optimizer.step(lr, divisor=clip_divisor(grad_norm, recipe.optim.clip))
        attachment.publish()
        seconds = time.perf_counter() - started + drawn.earlier_s
        row_ids = [i for rows in met.micro_batches for i in rows]
        tokens = sum(int(drawn.state.store.lengths[i]) for i in row_ids)
        yield Event(
            kind="step",
            step=step,
            time=time.time(),
            values={
                "loss": math.fsum(met.losses) / done.num_targets,
                "lr": lr,
                "grad_norm": grad_norm,
                "tokens": tokens,
                "computed": met.computed,
                "targets": done.num_targets,
                "passes": len(met.micro_batches),
                "rows": row_ids if drawn.rows is None else drawn.rows,
                **drawn.values(),
                **({"row_losses": [float(f"{loss:.6g}") for loss in met.row_losses]} if met.row_losses else {}),
                **({"loss_scale": state.loss_scale.value} if state.loss_scale.value != 1 else {}),
                **({"tokens_per_pass": smaller} if smaller is not None else {}),
            },
            timing={
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
                "peak_bytes": max(met.peak, peak_memory_bytes(state.device)),
                **drawn.timing,
            },
        )


def _drawn(state: TrainState, step: int) -> Drawn:
    """The rows that a step learns: from the store, or drawn for this step."""
    return Drawn(state) if state.draw is None else state.draw(state, step)


def _computed(state: TrainState, sampler: StepSampler, step: int) -> tuple[StepGradients, Computed]:
    """Compute the gradients of a step on this rank. Returns them, and what all ranks computed.

    Where memory ended on one rank of several, and a prepass saw the rows of the step, all ranks make the step
    again in micro-batches that fit: smaller ones draw other dropout masks than the prepass saw.
    """
    done = compute_gradients(state, sampler, step)
    met = meet(state.world, state.attachment.shared, done.computed, num_targets=done.num_targets)
    if state.world.size == 1 or state.task.prepass is None or met.exhausted is not None or met.tokens_per_pass is None:
        return done, met
    drop_gradients(state)
    done, again = _computed(state, replace(done.sampler, tokens_per_pass=met.tokens_per_pass), step)
    return done, replace(again, tokens_per_pass=again.tokens_per_pass or met.tokens_per_pass)


def _require_finite(
    state: TrainState, step: int, *, passes: list[MicroBatch], losses: list[float], grad_norm: float, lr: float
) -> None:
    if math.isfinite(grad_norm) and all(map(math.isfinite, losses)):
        return
    suspects = [rows for rows, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)] or passes
    sources = [str(state.store.source(i)) for rows in suspects for i in rows]
    loss = next((x for x in losses if not math.isfinite(x)), sum(losses))
    raise NonFiniteError(
        f"step {step}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:.3g}: the update was not "
        f"made. Rows of the step: {listed(sources, 8)}. Lower optim.lr, set precision: float32, or look at "
        "these rows."
    )
