"""A run: the loop inside a folder, with everything before, between and after its steps.

What happens becomes an event; `train` and `resume` differ only in where they start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunesmith import checkpoint
from tunesmith.describing import plan_values, report_facts, run_name, start_values
from tunesmith.errors import RunError, Stopped, TunesmithError
from tunesmith.evaluation.measure import evaluate
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.samples import answer_samples
from tunesmith.generation import Sampling
from tunesmith.loop import training_steps
from tunesmith.methods import METHODS
from tunesmith.optim import load_optimizer_tensors, optimizer_tensors
from tunesmith.preparing import OnProgress, Setup, prepare
from tunesmith.recipe.knobs import Recipe, known
from tunesmith.recipe.show import as_yaml
from tunesmith.run import Run
from tunesmith.types import Event

OnEvent = Callable[[Event], None]


@dataclass
class Progress:
    """What a run carries from checkpoint to checkpoint beside the tensors."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    train_seconds: float = 0.0
    prepare_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    """{"step", "loss"} of the lowest held-out loss so far."""

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def train(
    recipe: Recipe,
    *,
    root: Path = Path("runs"),
    out: Path | None = None,
    offline: bool = False,
    on_event: OnEvent = lambda event: None,
    on_progress: OnProgress = lambda what, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Tune a model as the recipe says; the finished run.

    Raises:
        InputError: recipe, data or model cannot be used; no run folder was made.
        Stopped: asked to stop; a checkpoint was written.
        NonFiniteError, CheckpointError, StorageError: the run failed; its last checkpoint is whole.
    """
    begun = time.perf_counter()
    setup = prepare(recipe, root=root if out is None else out.parent, offline=offline, on_progress=on_progress)
    run = Run.create(root, run_name(setup), as_yaml(setup.recipe, comments=False), out=out)
    with run.lock():
        setup.rows.keep(run.rows_path)
        progress = Progress(prepare_seconds=time.perf_counter() - begun)
        _drive(setup, run, progress, fresh=True, emit=_emitter(run, on_event), tick=on_progress, stop=should_stop)
    return run


def resume(
    run: Run,
    *,
    offline: bool = False,
    on_event: OnEvent = lambda event: None,
    on_progress: OnProgress = lambda what, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Go on with a stopped or broken run at the step after its newest whole checkpoint, as if it had never stopped.

    Raises:
        RunError: the run is finished, in use, or its data, tokenizer, template, model or settings changed.
    """
    if run.state() == "done":
        raise RunError(f"{run.path}: this run is done: nothing is left to resume. `tunesmith show` prints its report.")
    with run.lock():
        run.clear_stop()
        emit = _emitter(run, on_event)
        damaged: list[str] = []
        newest = checkpoint.newest(run.checkpoints_path, damaged.append)
        setup = prepare(run.recipe(), root=run.path.parent, offline=offline, on_progress=on_progress, run=run)
        if newest:
            _refuse_changes(run, setup.identity, newest.state["identity"])
        run.truncate_after(newest.step if newest else None)
        for text in damaged:
            emit(Event("note", newest.step if newest else 0, time.time(), {"text": text}))
        progress = Progress()
        if newest:
            _restore(setup, newest)
            progress = Progress(**newest.state["progress"])
            emit(Event("resume", newest.step, time.time(), {"from_step": newest.step}))
        _drive(setup, run, progress, fresh=newest is None, emit=emit, tick=on_progress, stop=should_stop)
    return run


def _refuse_changes(run: Run, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    changed = [
        f"{key} was {then.get(key)}, is {now.get(key)}"
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key)
    ]
    if changed:
        raise RunError(
            f"{run.path}: cannot go on as if nothing had happened, since this changed: {'; '.join(changed)}. "
            "Put it back, or start a new run with `tunesmith train`."
        )


def _restore(setup: Setup, saved: checkpoint.Loaded) -> None:
    """Weights and optimizer state of a checkpoint, bit for bit."""
    with torch.no_grad():
        for name, tensor in setup.attachment.trained.items():
            tensor.copy_(saved.weights[name])
    load_optimizer_tensors(setup.optimizer, setup.attachment.trained, saved.optimizer)
    setup.attachment.publish()


def _emitter(run: Run, on_event: OnEvent) -> OnEvent:
    def emit(event: Event) -> None:
        run.append(event)
        on_event(event)

    return emit


def _drive(
    setup: Setup,
    run: Run,
    progress: Progress,
    *,
    fresh: bool,
    emit: OnEvent,
    tick: OnProgress,
    stop: Callable[[], bool],
) -> None:
    """Everything a run does once model and rows are ready; whatever ends it is the last event in its log."""
    try:
        if fresh:
            emit(Event("start", 0, time.time(), start_values(setup)))
            emit(Event("plan", 0, time.time(), plan_values(setup)))
            _look(setup, progress, "before", emit, tick)
            _save(setup, run, progress, emit)
        _steps(setup, run, progress, emit, tick, stop)
        _look(setup, progress, "after", emit, tick)
        _save_result(setup, run)
        report = write_report(run, report_facts(setup), progress.state())
        emit(Event("end", progress.step, time.time(), {"report": report}))
    except Stopped as stopped:
        emit(Event("stopped", progress.step, time.time(), {"message": str(stopped)}))
        raise
    except TunesmithError as error:
        emit(Event("failed", progress.step, time.time(), {"code": type(error).__name__, "message": str(error)}))
        raise


def _steps(
    setup: Setup, run: Run, progress: Progress, emit: OnEvent, tick: OnProgress, stop: Callable[[], bool]
) -> None:
    every, save_every = setup.recipe.evaluation.every, setup.recipe.checkpoint.every
    assert save_every != "auto"

    def stop_if_asked(saved: bool) -> None:
        if stop() or run.stop_asked():
            if not saved:
                _save(setup, run, progress, emit)
            raise Stopped(f"stopped after step {progress.step} of {setup.total_steps}: tunesmith resume {run.path}")

    stop_if_asked(saved=True)
    for event in training_steps(setup, start=progress.step):
        emit(event)
        progress.step = event.step
        progress.tokens += event.values["tokens"]
        progress.targets += event.values["targets"]
        progress.train_seconds += event.timing["seconds"]
        last = event.step == setup.total_steps
        if every and event.step % every == 0 and not last:
            _evaluate(setup, progress, "step", emit, tick)
        due = last or event.step % save_every == 0
        if due:
            _save(setup, run, progress, emit)
        stop_if_asked(saved=due)


def _look(setup: Setup, progress: Progress, name: str, emit: OnEvent, tick: OnProgress) -> None:
    """Held-out loss, then the sample prompts answered."""
    _evaluate(setup, progress, name, emit, tick)
    begun = time.perf_counter()
    how = Sampling(max_new_tokens=setup.recipe.evaluation.sample_tokens)
    for index, sample in enumerate(answer_samples(setup.model, setup.renderer, setup.samples, how, tick)):
        emit(Event("sample", progress.step, time.time(), {"name": name, "index": index, **sample}))
    progress.evaluate_seconds += time.perf_counter() - begun


def _evaluate(setup: Setup, progress: Progress, name: str, emit: OnEvent, tick: OnProgress) -> None:
    begun = time.perf_counter()
    score = evaluate(
        setup.model,
        setup.task,
        store=setup.rows.held_store,
        rows=setup.rows.held_rows,
        tokens_per_pass=setup.plan.tokens_per_pass,
        layout=setup.plan.layout,
        device=setup.device,
        progress=lambda done, total: tick("evaluate", done, total),
    )
    seconds = time.perf_counter() - begun
    progress.evaluate_seconds += seconds
    if name != "before" and score.loss < progress.best.get("loss", math.inf):
        progress.best = {"step": progress.step, "loss": score.loss}
    values = {
        "name": name,
        "loss": score.loss,
        "token_accuracy": score.token_accuracy,
        "rows": score.rows,
        "targets": score.targets,
    }
    emit(Event("evaluation", progress.step, time.time(), values, {"seconds": seconds}))


def _save(setup: Setup, run: Run, progress: Progress, emit: OnEvent) -> None:
    folder = checkpoint.save(
        run.checkpoints_path,
        progress.step,
        weights=setup.attachment.trained,
        optimizer=optimizer_tensors(setup.optimizer, setup.attachment.trained),
        state={"progress": progress.state(), "identity": setup.identity},
    )
    emit(Event("checkpoint", progress.step, time.time(), {"path": str(folder.relative_to(run.path))}))
    checkpoint.rotate(run.checkpoints_path, keep=setup.recipe.checkpoint.keep, best=progress.best.get("step"))


def _save_result(setup: Setup, run: Run) -> None:
    method = METHODS[setup.recipe.method.name]
    folder = run.model_path if method.name == "full" else run.adapter_path
    method.save_result(setup.attachment, folder, model=setup.model, renderer=setup.renderer, located=setup.located)
