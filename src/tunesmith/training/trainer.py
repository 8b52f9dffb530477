"""Train a run: the loop inside a run folder, with everything before, between and after its steps.

Everything that happens becomes an event; `train` and `resume` differ only in where they start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.data.addresses import short_name
from tunesmith.environment import in_force
from tunesmith.errors import CheckpointError, OutOfMemoryError, RecipeError, RunError, Stopped, StorageError
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.report import write_report
from tunesmith.formatting import command
from tunesmith.inference.load import as_renamed
from tunesmith.methods import METHODS, restore, state_dict
from tunesmith.models.modes import count_layers
from tunesmith.recipe import load
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs import checkpoint, events
from tunesmith.runs.atomic import fsync_file, remove, storing, temporary_folder, write_atomic
from tunesmith.runs.background import BackgroundCall
from tunesmith.runs.folder import Run, made_from, runs
from tunesmith.training.disk import refuse_small_disk
from tunesmith.training.evaluate import evaluate_run, find_high_loss_rows, measure_held_out
from tunesmith.training.loop import training_steps
from tunesmith.training.progress import Listener, OnEvent, Progress, Session
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.summary import plan_timing, plan_values, report_facts, run_name, start_values
from tunesmith.types import Event

SAME_UPDATE = ("train.tokens_per_pass", "train.checkpointed_layers", "memory")
"""Options that change the memory of a step, and of its result only rounding and the random numbers of dropout."""
NAMED_LATER = {
    "setting train.group_by_length": "False",
    "setting data.date": "None",
    "setting data.mix": "times",
    "setting repeatable": "False",
}
"""Settings that earlier versions did not record in a run's identity, with the values they used."""

RETOLD = {"plan", "evaluation", "sample", "answers", "general"}
"""Kinds of events that the summary at the end of a run needs."""

__all__ = ["Listener", "OnEvent", "resume", "train"]


def train(
    recipe: Recipe,
    *,
    root: Path = Path("runs"),
    out: Path | None = None,
    offline: bool = False,
    listener: Listener | None = None,
) -> Run:
    """Tune a model as the recipe says; return the finished run.

    Raises:
        InputError: recipe, data or model cannot be used; no run folder was made.
        Stopped: stopped on request; a checkpoint was written.
        NonFiniteError, CheckpointError, StorageError: the run failed; its last checkpoint is whole.
    """
    listener = listener or Listener()
    started = time.perf_counter()
    setup = prepare(recipe, root=root, offline=offline, on_progress=listener.on_progress)
    refuse_small_disk(setup, out or root)
    yaml = as_yaml(setup.recipe, comments=False)
    run = Run.create(root, _name_among(setup, root), yaml, out=out, recipe=setup.recipe)
    listener.on_run(run)
    with run.lock():
        setup.rows.keep(run.rows_path)
        progress = Progress(prepare_seconds=time.perf_counter() - started)
        _drive(Session(setup, run, progress, listener), fresh=True)
    return run


def _name_among(setup: Setup, root: Path) -> str:
    """The run's name; with the extension of its data file if a run of another file has the same name without it."""
    name, file = run_name(setup), Path(short_name(setup.recipe.data.train[0].path))
    if setup.recipe.name is not None or not file.suffix:
        return name
    others = {Path(path).name for run in runs(root) for path in made_from(run)}
    is_shared = any(other != file.name and other.split(".")[0] == name for other in others)
    return f"{name}-{file.name.split('.')[1]}" if is_shared else name


def resume(run: Run, *, settings: Sequence[str] = (), offline: bool = False, listener: Listener | None = None) -> Run:
    """Continue a stopped or broken run at the step after its newest whole checkpoint, as if it had never stopped.

    `settings`: key=value of SAME_UPDATE.

    Raises:
        RecipeError: a setting that would make it another run.
        RunError: the run is finished or in use, or its data, tokenizer, template, model or settings changed.
        And whatever `train` raises.
    """
    if run.state() == "done":
        raise RunError(f"{run.path}: this run is done: nothing is left to resume. `tunesmith show` prints its report.")
    listener = listener or Listener()
    listener.on_run(run)
    started = time.perf_counter()
    with run.lock():
        run.clear_stop()
        damaged: list[str] = []
        newest = checkpoint.newest(run.checkpoints_path, lambda path, why: damaged.append(f"{path}: {why}"))
        _mend_log(run, newest, listener)
        recipe = _with_settings(run, settings)
        then = newest.state["identity"] if newest else run.identity()
        _refuse_other_order(run, then)
        setup = prepare(recipe, root=run.path.parent, offline=offline, on_progress=listener.on_progress, run=run)
        unnamed: list[str] = []
        set_before: list[str] = []
        if then:
            unnamed, then = [key for key in NAMED_LATER if key not in then], {**NAMED_LATER, **then}
            then = as_renamed(then, setup.identity)
            same_update = {f"setting {key}" for key in SAME_UPDATE}
            try:
                _refuse_changes(run, _without(setup.identity, same_update), _without(then, same_update))
            except RunError:
                setup.rows.discard()
                raise
            set_before = [] if settings else _set_before(setup.identity, then)
        refuse_small_disk(setup, run.path)
        planned = next((event for event in run.events() if event.kind == "plan"), None)
        run.truncate_after(newest.step if newest else -1)
        seconds = time.perf_counter() - started
        progress = Progress(**newest.state["progress"]) if newest else Progress(prepare_seconds=seconds)
        if any(setting.startswith("train.tokens_per_pass") for setting in [*settings, *set_before]):
            progress.tokens_per_pass = None
        elif progress.tokens_per_pass is not None:
            setup.plan = replace(setup.plan, tokens_per_pass=progress.tokens_per_pass)
        session = Session(setup, run, progress, listener)
        for text in [*damaged, *set_before, *(f"{key}: {NAMED_LATER[key]}, as when this run began" for key in unnamed)]:
            session.emit("note", {"text": text})
        if newest:
            restore(setup.attachment, newest.weights)
            setup.optimizer.load(newest.optimizer)
            session.emit("resume", {"from_step": newest.step})
        if settings:
            write_atomic(run.recipe_path, as_yaml(setup.recipe, comments=False).encode())
            session.emit("note", {"text": f"resumed with other settings: {', '.join(settings)}"})
            if newest:
                _save(session)  # what the next resume finds goes with the recipe that it finds
        _drive(session, fresh=newest is None, planned=planned)
    return run


def _mend_log(run: Run, newest: checkpoint.Checkpoint | None, listener: Listener) -> None:
    """Repair a damaged log of events from the newest checkpoint, and report it in the log and to the listener."""
    said = ""
    if newest is not None and newest.log is not None:
        if wrong := events.repair(run.events_path, newest.log):
            said = f"{wrong}; the log is as the checkpoint of step {newest.step} has it"
    elif newest is None:
        try:
            for _ in run.events():
                pass
        except RunError as error:
            aside = run.path / "damaged-events.jsonl"
            with storing(aside):
                run.events_path.replace(aside)
            said = f"{error} There is no checkpoint yet, so the run starts over; the old log is kept as {aside.name}"
    if said:
        for event in run.events():
            if event.kind in RETOLD:
                listener.on_event(event)  # a reader of the damaged log may not have seen it
        note = Event("note", newest.step if newest else 0, time.time(), {"text": said}, {})
        run.append(note)
        listener.on_event(note)


def _with_settings(run: Run, settings: Sequence[str]) -> Recipe:
    keys = [setting.partition("=")[0].strip() for setting in settings]
    if other := [key for key in keys if key not in SAME_UPDATE]:
        raise RecipeError(
            f"--set {other[0]}: it would be another run. When a run is resumed, only {', '.join(SAME_UPDATE)} can "
            "change; for anything else start a new run with `tunesmith train`."
        )
    return run.place(load.load(str(run.recipe_path), settings)) if settings else run.recipe()


def _without(identity: Mapping[str, str], keys: set[str]) -> dict[str, str]:
    return {key: value for key, value in identity.items() if key not in keys}


def _set_before(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Notes on settings that a `resume --set`, killed before its checkpoint, left in recipe.yaml."""
    pairs = [(key, now.get(f"setting {key}"), then.get(f"setting {key}")) for key in SAME_UPDATE]
    return [f"{key} is {new} in recipe.yaml; it was {old} until here" for key, new, old in pairs if new != old]


def _refuse_other_order(run: Run, then: Mapping[str, str]) -> None:
    """Raise RunError for a run of an earlier version with another order of rows, before anything is loaded."""
    if then and "setting order of rows" not in then:
        raise RunError(
            f"{run.path}: an earlier version of Tunesmith began this run, and this one takes rows in another order: "
            "some would be trained twice, others not at all. Resume it with the version that began it, or start a new "
            "run with `tunesmith train`."
        )


def _refuse_changes(run: Run, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    changed = [
        f"{key} was {then.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted({*now, *then})
        if now.get(key) != then.get(key)
    ]
    if changed:
        raise RunError(
            f"{run.path}: cannot resume exactly, because this changed: {'; '.join(changed)}. "
            "Put it back, or start a new run with `tunesmith train`."
        )


def _drive(session: Session, *, fresh: bool, planned: Event | None = None) -> None:
    """Do everything that follows once model and rows are ready; the reason it ends is the last event in its log.

    `planned`: the earlier plan of a run that starts over because it was killed before its first checkpoint.
    """
    setup, run = session.setup, session.run
    try:
        if fresh:
            session.emit("start", start_values(setup), {"environment": in_force(os.environ)})
            session.emit("plan", *_plan(setup, planned))
            evaluate_run(session, "before")
            trial = BackgroundCall(partial(_try_saving, setup, run))  # which reads what is saved, and writes elsewhere
            try:
                _save(session)
            finally:
                trial.result()
        _take_steps(session)
        _keep_best(session)
        evaluate_run(session, "after")
        find_high_loss_rows(session)
        _save_result(setup, run)
        session.listener.on_progress("report", 0, 1)
        session.emit("end", {"report": write_report(run, _facts(session), asdict(session.progress))})
    except Stopped as stopped:
        session.emit("stopped", {"message": str(stopped)})
        raise
    except Exception as error:  # the outermost frame of a run: log the reason and raise it again
        with suppress(StorageError):  # a full disk may refuse the last line too: the first error counts
            session.emit("failed", {"code": type(error).__name__, "message": str(error)})
        raise


def _plan(setup: Setup, planned: Event | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and timing of the "plan" event. A run that starts over repeats the choices and predictions of its first
    start, because its recipe is resolved by now."""
    values, timing = plan_values(setup), plan_timing(setup)
    if planned is None:
        return values, timing
    warnings = dict.fromkeys([*planned.values.get("warnings", ()), *values["warnings"]])
    kept = {key: planned.values[key] for key in ("given", "choices") if key in planned.values}
    kept["warnings"] = list(warnings)
    return {**values, **kept}, {**planned.timing, **timing}


def _facts(session: Session) -> dict[str, Any]:
    """Facts for the report; the notes are those of the first start, also in a resumed run."""
    plan = next((event.values for event in session.run.events() if event.kind == "plan"), {})
    return {**report_facts(session.setup), "notes": plan.get("warnings", [])}


def _take_steps(session: Session) -> None:
    setup, progress = session.setup, session.progress
    save_every = resolved(setup.recipe.checkpoint.every)
    _stop_if_requested(session, saved=True)
    if _patience_is_over(session):
        return
    for event in _steps_or_saved(session):
        progress.step = event.step
        progress.tokens += event.values["tokens"]
        progress.targets += event.values["targets"]
        progress.train_seconds += event.timing["seconds"]
        session.pass_on(event)
        if "tokens_per_pass" in event.values:
            progress.tokens_per_pass = event.values["tokens_per_pass"]
            session.emit("note", {"text": _halved(event)})
        last = event.step == setup.total_steps
        if _evaluation_is_due(setup, event.step):
            measure_held_out(session, "step")
        over = not last and _patience_is_over(session)
        is_best = progress.best.get("step") == event.step  # the best is kept only if it was saved
        due = last or over or is_best or event.step % save_every == 0
        if due:
            _save(session)
        if over:
            patience = setup.recipe.evaluation.patience
            why = f"{patience} evaluations without a new best (evaluation.patience)"
            session.emit("note", {"text": f"stopped early after step {event.step}: {why}"})
            return
        if not last:
            _stop_if_requested(session, saved=due)


def _steps_or_saved(session: Session) -> Iterator[Event]:
    """Yield the steps. If memory runs out for good, save the steps so far and say how to continue."""
    try:
        yield from training_steps(session.setup, start=session.progress.step)
    except OutOfMemoryError as error:
        _save(session)
        num_layers = count_layers(session.setup.model)
        settings = f" --set train.checkpointed_layers={num_layers}" if num_layers else ""
        way = f"{command('resume', session.run.path)} --set train.tokens_per_pass=1{settings}"
        message = f"{error} Saved: step {session.progress.step}. Resume on a machine with more memory, or with: {way}"
        raise OutOfMemoryError(message, step=error.step, lengths=error.lengths, peak=error.peak) from error


def _halved(event: Event) -> str:
    tokens, peak = event.values["tokens_per_pass"], event.timing["peak_bytes"]
    return (
        f"out of memory in step {event.step} ({peak / 2**30:.2f} GiB at most): it was retried, and training continues, "
        f"with micro-batches of at most {tokens:,} tokens; the update is the same but for dropout"
    )


def _evaluation_is_due(setup: Setup, step: int) -> bool:
    """Every `evaluation.every` steps, and at the last step if it may be the best."""
    every = setup.recipe.evaluation.every
    if every is None:
        return False
    return step % every == 0 if step < setup.total_steps else setup.recipe.evaluation.keep == "best"


def _patience_is_over(session: Session) -> bool:
    patience = session.setup.recipe.evaluation.patience
    return patience is not None and session.progress.without_best >= patience


def _keep_best(session: Session) -> None:
    """Restore the weights of the best evaluation if the recipe wants them and they are not the last."""
    setup, progress = session.setup, session.progress
    best, metric = progress.best, setup.recipe.evaluation.metric
    progress.kept = {"step": progress.step, "reason": "the last step"}
    if setup.recipe.evaluation.keep != "best" or not best:
        return
    value = f"{METRICS[metric].label} {METRICS[metric].text(best['value'])}"
    if best["step"] != progress.step:
        try:
            restore(setup.attachment, checkpoint.load(session.run.checkpoints_path / f"step-{best['step']}").weights)
        except CheckpointError as error:
            session.emit("note", {"text": f"the best step's checkpoint is lost, the last step is kept: {error}"})
            return
    progress.kept = {"step": best["step"], "reason": f"the best evaluation: {value}"}
    session.emit("note", {"text": f"kept: step {best['step']}, {progress.kept['reason']}"})


def _stop_if_requested(session: Session, *, saved: bool) -> None:
    if session.listener.should_stop() or session.run.stop_asked():
        if not saved:
            _save(session)
        done = f"stopped after step {session.progress.step} of {session.setup.total_steps}"
        raise Stopped(f"{done}; resume with: {command('resume', session.run.path)}")


def _save(session: Session) -> None:
    setup, run, step = session.setup, session.run, session.progress.step
    fsync_file(run.events_path)  # a checkpoint must not contain steps that its log has lost
    folder = checkpoint.save(
        run.checkpoints_path,
        step,
        weights=state_dict(setup.attachment),
        optimizer=setup.optimizer.state(),
        state={"progress": asdict(session.progress), "identity": setup.identity},
        log=run.events_path,
    )
    session.emit("checkpoint", {"path": folder.relative_to(run.path).as_posix()})
    checkpoint.rotate(run.checkpoints_path, keep=setup.recipe.checkpoint.keep, best=session.progress.best.get("step"))


def _try_saving(setup: Setup, run: Run) -> None:
    """Save the result once and remove it, so that saving cannot fail for the first time after the last step."""
    folder = temporary_folder(run.path, "trial-result")
    try:
        setup.save_result(folder)
    finally:
        remove(folder)


def _save_result(setup: Setup, run: Run) -> None:
    folder = run.adapter_path if METHODS[setup.recipe.method.name].is_adapter else run.model_path
    setup.save_result(folder)
    run.keep_hashes(folder)
