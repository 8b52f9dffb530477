"""Artifacts of a run: checkpoints, snapshots of its result, and the result; each is complete or absent."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from functools import partial

from tunesmith.methods import METHODS
from tunesmith.runs import checkpoint, events
from tunesmith.runs.atomic import fsync_file, remove, temporary_folder, writing_folder
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run
from tunesmith.training.progress import Session
from tunesmith.training.setup import Setup
from tunesmith.training.together import refuse_drift, whole_state
from tunesmith.types import Record


def save(session: Session) -> None:
    """Save a checkpoint, on every rank at once. Raises GroupError if the weights of a rank have drifted."""
    refuse_drift(session)
    if session.setup.world.is_first:
        _write(session)
    elif session.setup.attachment.shards:
        for part in whole_state(session.setup):
            checkpoint.gather(part)


def save_and_try(session: Session) -> None:
    """Save the first checkpoint; meanwhile the first rank saves a result and removes it, as a trial."""
    setup = session.setup
    weights = setup.whole_weights()
    trial = in_background(partial(_try_saving, setup, session.run, weights)) if setup.world.is_first else None
    try:
        save(session)
    finally:
        if trial is not None:
            trial.result()


def _write(session: Session) -> None:
    setup, run, step = session.setup, session.run, session.progress.step
    fsync_file(run.events_path)  # a checkpoint must not contain steps that its log has lost
    weights, optimizer = whole_state(setup)
    folder = checkpoint.save(
        run.checkpoints_path,
        step,
        weights=weights,
        optimizer=optimizer,
        state={
            "progress": asdict(session.progress),
            "identity": setup.identity,
            "log": events.digest(run.events_path),
            **({} if setup.drawing is None else {"drawn": setup.drawing.pending(step)}),
        },
    )
    session.emit("checkpoint", {"path": folder.relative_to(run.path).as_posix()})
    checkpoint.rotate(run.checkpoints_path, keep=setup.recipe.checkpoint.keep, best=session.progress.best.get("step"))


def _try_saving(setup: Setup, run: Run, weights: Record) -> None:
    """Save the result once and remove it, so that saving cannot fail for the first time after the last step."""
    folder = temporary_folder(run.path, "trial-result")
    try:
        setup.save_result(folder, **weights)
    finally:
        remove(folder)


def snapshot_steps(setup: Setup) -> range:
    """Ends of the newest epochs before the last step."""
    steps, num = setup.sampler.steps_per_epoch, setup.recipe.checkpoint.snapshots
    last = (setup.total_steps - 1) // steps * steps
    return range(last, max(0, last - num * steps), -steps)


def keep_snapshot(session: Session, *, at: str) -> None:
    """Save the result as it is now into a folder of the run: complete or absent. `at`: epoch or stop."""
    run, name, weights = session.run, f"step-{session.progress.step}", session.setup.whole_weights()
    if not session.setup.world.is_first:
        return
    with writing_folder(run.snapshots_path / name) as staged:
        for path in (run.recipe_path, run.path / "run.json", run.events_path):
            shutil.copyfile(path, staged / path.name)
        save_result(session.setup, Run(staged), weights)
    session.emit("snapshot", {"path": f"{run.snapshots_path.name}/{name}", "at": at})


def save_result(setup: Setup, run: Run, weights: Record) -> None:
    """Save the tuned adapter or model in its run. `weights`: see `Setup.whole_weights`."""
    folder = run.adapter_path if METHODS[setup.recipe.method.name].is_adapter else run.model_path
    setup.save_result(folder, **weights)
    run.keep_hashes(folder)
