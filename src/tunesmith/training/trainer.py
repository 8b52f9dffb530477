"""Train a run: the loop inside a run folder, with everything before, between and after its steps.

Everything that happens becomes an event; `train` and `resume` differ only in where they start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from tunesmith.environment.settings import in_force
from tunesmith.errors import (
    CheckpointError,
    DeviceError,
    InputError,
    OutOfMemoryError,
    RecipeError,
    Stopped,
    StorageError,
    TeacherError,
    UngradedError,
    WayOut,
    one_line,
)
from tunesmith.evaluation.metrics import METRICS
from tunesmith.evaluation.report import write_report
from tunesmith.evaluation.report.values import rows_of
from tunesmith.methods import restore
from tunesmith.models.card import is_lost
from tunesmith.models.memory import free_cached_memory
from tunesmith.models.modes import layers_of
from tunesmith.parallel.launch import own_run
from tunesmith.parallel.world import World
from tunesmith.phrases import command, set_words, size
from tunesmith.planning.forecast import heaviest
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.runs import checkpoint, events
from tunesmith.runs.atomic import write_atomic
from tunesmith.runs.folder import FollowedRun, Run, refuse_done, refuse_taken
from tunesmith.training.artifacts import keep_snapshot, save, save_and_try, save_result, snapshot_steps
from tunesmith.training.check_sampler import check_sampler
from tunesmith.training.evaluate import evaluate_run, find_high_loss_rows, measure_on_the_way
from tunesmith.training.loop import training_steps
from tunesmith.training.progress import Listener, OnEvent, Progress, Session, noted
from tunesmith.training.reference import check_start, share_reference, use_reference
from tunesmith.training.same_run import (
    NAMED_LATER,
    recipe_with,
    refuse_other_run,
    settings_of_group,
    with_settings,
)
from tunesmith.training.setup import Setup, prepare, refuse_small_disk
from tunesmith.training.step import rehearse
from tunesmith.training.summary import (
    PLAN,
    first_plan,
    plan_of,
    plan_timing,
    plan_values,
    report_facts,
    run_name,
    start_values,
)
from tunesmith.training.symptoms import symptoms
from tunesmith.training.teacher import use_teacher
from tunesmith.training.together import (
    DIGEST,
    broadcast,
    joined,
    own_piece,
    receive_start,
    recipe_digest,
    refuse_other_inputs,
    share_start,
    unfinished,
)
from tunesmith.types import Event

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
        Stopped: stopped on request; a checkpoint was written. NonFiniteError, CheckpointError, StorageError,
        DeviceError: the run failed; its last checkpoint is whole.
    """
    run = _train(recipe, root=root, out=out, offline=offline, listener=listener or Listener())
    free_cached_memory()  # of a card, too, which whatever follows in this process needs
    return run


def _train(recipe: Recipe, *, root: Path, out: Path | None, offline: bool, listener: Listener) -> Run:
    with joined(recipe.device, listener.on_progress) as world:
        if world.size == 1 and recipe.devices not in ("auto", 1):
            raise RecipeError(
                f"devices: {recipe.devices}: this process is alone. `tunesmith train` and `tunesmith.train` start the "
                "others; of processes that you start yourself, torchrun does."
            )
        recipe_sha = recipe_digest(recipe)
        run = _found_again(world, recipe_sha, out)
        if run is not None:
            return _resume(world, run, settings=(), offline=offline, listener=listener)
        refuse_taken(out if world.is_first else None)
        started = time.perf_counter()
        setup = prepare(recipe, root=root, offline=offline, on_progress=listener.on_progress, world=world)
        refuse_other_inputs(setup)
        if not world.is_first:
            return _follow(setup, listener)
        refuse_small_disk(setup, out or root)
        yaml = as_yaml(setup.recipe, comments=False)
        # The plan comes with the folder: a kill before it is logged must not lose what was predicted.
        more = {DIGEST: recipe_sha, PLAN: {"values": plan_values(setup), "timing": plan_timing(setup)}}
        run = Run.create(root, run_name(setup), yaml, out=out, recipe=setup.recipe, more=more)
        listener.on_run(run)
        with run.lock():
            setup.rows.keep(run.rows_path)
            progress = Progress(prepare_seconds=time.perf_counter() - started)
            session = Session(setup, run, progress, noted(listener, run))
            share_start(session, None)
            _drive(session, fresh=True)
    return run


def _found_again(world: World, recipe_sha: str, out: Path | None) -> Run | None:
    """The run to continue, if another program started this group of processes again; None: the group begins a
    new run."""
    if not world.place.was_started:
        return None
    if out is None:
        if world.size == 1:
            return None
        raise RecipeError("--out: is needed where another program starts the processes: a restart finds its run there.")
    found = unfinished(out, recipe_sha) if world.is_first else None
    if world.size == 1:
        return found
    world.publish(f"found/{world.rank}", (out / "run.json").is_file())
    here = world.wait_for("found/0")
    if world.is_first and not here:
        for rank in range(1, world.size):
            if world.wait_for(f"found/{rank}", rank):
                raise InputError(
                    f"{out}: rank {rank} on {world.joined[rank]['host']} has a run there, rank 0 on "
                    f"{world.joined[0]['host']} has none. Give all machines one disk for --out."
                )
    return found or (Run(out) if here else None)


def _follow(setup: Setup, listener: Listener) -> Run:
    """Take part in a run that the first rank owns."""
    start = receive_start(setup)
    run = FollowedRun(start.run.path)
    own_run(run, setup.world.rank)
    if setup.drawing is not None:
        setup.drawing.close()  # the first rank grades for all; here the grader was loaded for its hash
    listener.on_run(run)
    _fit_memory(setup, start.progress)
    session = Session(setup, run, start.progress, Listener(should_stop=listener.should_stop))
    if start.saves:
        save(session)
    _drive(session, fresh=start.is_fresh)
    return start.run


def resume(run: Run, *, settings: Sequence[str] = (), offline: bool = False, listener: Listener | None = None) -> Run:
    """Continue a stopped or broken run at the step after its newest whole
    checkpoint, as if it had never stopped.

    `settings`: key=value of MAY_CHANGE.

    Raises:
        RecipeError: a setting that would make it another run.
        RunError: the run is finished or in use, or its data, tokenizer, template, model or settings changed.
        And whatever `train` raises.
    """
    listener = listener or Listener()
    with joined(run.recipe().device, listener.on_progress) as world:
        if world.is_first:
            refuse_done(run)
        done_run = _resume(world, run, settings=settings, offline=offline, listener=listener)
    free_cached_memory()
    return done_run


def _resume(world: World, run: Run, *, settings: Sequence[str], offline: bool, listener: Listener) -> Run:
    root = run.path.parent
    if not world.is_first:
        if world.wait_for("done"):
            return run
        setup = prepare(Recipe(), root=root, offline=offline, run=run, world=world)
        refuse_other_inputs(setup)
        return _follow(setup, listener)
    is_done = run.state() == "done"
    world.publish("done", is_done)
    listener.on_run(run)
    if is_done:
        return run
    listener = noted(listener, run)
    started = time.perf_counter()
    with run.lock():
        # 1. The newest checkpoint, whose log nobody has changed.
        run.clear_stop()
        damaged: list[str] = []
        newest = checkpoint.newest(run.checkpoints_path, lambda path, why: damaged.append(f"{path}: {why}"))
        if newest is not None and "log" in newest.state:
            events.refuse_changed(run.events_path, newest.state["log"])
        # 2. The run set up again, which has to be the same one.
        settings = [*settings, *settings_of_group(with_settings(run, settings), world)]
        recipe = recipe_with(run, settings)
        then = newest.state["identity"] if newest else run.identity()
        setup = prepare(recipe, root=root, offline=offline, on_progress=listener.on_progress, run=run, world=world)
        set_before, unnamed = refuse_other_run(run, setup, then, settings)
        refuse_other_inputs(setup)
        refuse_small_disk(setup, run.path)
        planned = first_plan(run)
        events.truncate_after(run.events_path, newest.step if newest else -1)
        seconds = time.perf_counter() - started
        progress = Progress(**newest.state["progress"]) if newest else Progress(prepare_seconds=seconds)
        if any(setting.startswith("train.tokens_per_pass") for setting in [*settings, *set_before]):
            progress.tokens_per_pass = None
        _fit_memory(setup, progress)
        session = Session(setup, run, progress, listener)
        for text in [*damaged, *set_before, *(f"{key}: {NAMED_LATER[key]}, as when this run began" for key in unnamed)]:
            session.emit("note", {"text": text})
        # 3. The state of the checkpoint.
        if newest:
            use_reference(session)
            weights, optimizer = (
                {name: own_piece(setup, name, tensor) for name, tensor in part.items()}
                for part in (newest.weights, newest.optimizer)
            )
            restore(setup.attachment, weights)
            setup.optimizer.load(optimizer)
            if setup.drawing is not None:
                setup.drawing.take(newest.state.get("drawn", {}))
            session.emit("resume", {"from_step": newest.step})
        share_start(session, newest, saves=bool(settings))
        if settings:
            write_atomic(run.recipe_path, as_yaml(setup.recipe, comments=False).encode())
            session.emit("note", {"text": f"resumed with other settings: {', '.join(settings)}"})
            if newest:
                save(session)  # what the next resume finds goes with the recipe that it finds
        _drive(session, fresh=newest is None, planned=planned)
    return run


def _fit_memory(setup: Setup, progress: Progress) -> None:
    """Set the smaller micro-batches of a run whose memory ran out before."""
    if progress.tokens_per_pass is not None:
        setup.sampler = replace(setup.sampler, tokens_per_pass=progress.tokens_per_pass)


def _drive(session: Session, *, fresh: bool, planned: Event | None = None) -> None:
    """Train a run whose model and rows are ready. The last event of its log says why it ended.

    `planned`: the earlier plan of a run that starts over because it was killed before its first checkpoint.
    """
    setup, run = session.setup, session.run
    setup.world.wants_stop = lambda: session.listener.should_stop() or run.stop_asked()
    if setup.drawing is not None:
        setup.drawing.tick = session.listener.on_progress
        setup.drawing.notes.say = lambda text: session.emit("note", {"text": text})
        for text in setup.drawing.keep_in(run.path) if setup.world.is_first else ():
            session.emit("note", {"text": text})
    try:
        with setup.world.passing():
            _run(session, fresh=fresh, planned=planned)
    except Stopped as stopped:
        session.emit("stopped", {"message": str(stopped)})
        raise
    except Exception as error:  # the outermost frame of a run: log the reason and raise it again
        failure = _card_lost(session, error) if is_lost(error) else error
        with suppress(StorageError):  # a full disk may refuse the last line too: the first error counts
            values = {"code": type(failure).__name__, "message": str(failure)}
            ways = [asdict(way) for way in getattr(failure, "ways", ())]
            session.emit("failed", {**values, **({"ways": ways} if ways else {})})
        if failure is error:
            raise
        raise failure from error
    finally:
        if setup.drawing is not None:
            setup.drawing.close()
        setup.world.wants_stop = lambda: False  # a circle: the model would stay on its card until the next collection


def _card_lost(session: Session, error: Exception) -> DeviceError:
    """The error of a card that failed in mid-run, with the way to go on."""
    path, saved = session.run.path, [int(at.name[5:]) for at in session.run.checkpoints_path.glob("step-*")]
    way = f"Step {max(saved)} is saved: {command('resume', path)}" if saved else "Nothing was saved: start it again"
    return DeviceError(
        f"after step {session.progress.step}: {session.setup.device} failed: {one_line(error)}. {way}; `nvidia-smi` "
        "says whether the card works, and the system's log (`dmesg`) why it failed."
    )


def _run(session: Session, *, fresh: bool, planned: Event | None) -> None:
    """Measure, save, take the steps, measure again, and write the result. Ranks other than the first only take
    part."""
    setup, run = session.setup, session.run
    if fresh:
        session.emit("start", start_values(setup), {"environment": in_force(os.environ)})
        session.emit("plan", *plan_of(setup, planned))
        if planned is None and setup.rows.found_again:
            session.emit("note", {"text": setup.rows.found_again, "aside": True})
        use_reference(session)
    share_reference(setup)
    _have_rows_read(session)
    if fresh:
        check_start(setup)
        check_sampler(setup)
        evaluate_run(session, "before")
        save_and_try(session)
    if setup.world.is_sharded:
        heavy = heaviest(setup.sampler, setup.total_steps, setup.store)
        rehearse(setup, heavy.rows, times=1 + heavy.accumulating)
    _take_steps(session)
    learnt = {key.rpartition("/")[0] for key in setup.optimizer.state()}
    if still := [name for name in setup.attachment.trained if name not in learnt]:
        text = f"{len(still)} trained weights never got a gradient, such as {still[0]}: they have not changed"
        is_usual = all("pooler." in name for name in still)  # a layer of BERT that other heads do not read
        session.emit("note", {"text": text, **({"detail": True} if is_usual else {})})
    _keep_best(session)
    with _saved_ungraded(session):
        evaluate_run(session, "after")
    if setup.world.is_first:
        rows = list(rows_of(run, "after").values())
        for text in symptoms(setup.task.name, list(run.events()), rows, setup.recipe.loss):
            session.emit("note", {"text": text})
    find_high_loss_rows(session)
    weights = setup.whole_weights()
    if not setup.world.is_first:
        return
    save_result(setup, run, weights)
    session.listener.on_progress("report", 0, 1)
    plan = next((event.values for event in run.events() if event.kind == "plan"), {})
    notes = plan.get("warnings", [])  # of the first start, also in a resumed run
    facts = {**report_facts(setup), "name": run.path.name, "notes": notes}
    session.emit("end", {"report": write_report(run, facts, asdict(session.progress))})


def _have_rows_read(session: Session) -> None:
    """Have the teacher read the rows, if there is one; where one at an address is silent, how to go on is
    said."""
    setup, run = session.setup, session.run
    try:
        use_teacher(setup.teacher, setup.rows, run.rows_path, setup.world, on_progress=session.listener.on_progress)
    except TeacherError as error:
        way = f"What it has said is kept. Mend what it needs and go on: {command('resume', run.path)}."
        raise TeacherError(f"{error} {way}") from error


def _take_steps(session: Session) -> None:
    setup, progress = session.setup, session.progress
    save_every = resolved(setup.recipe.checkpoint.every)
    setup.world.agree_to_stop()
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
            with _saved_ungraded(session):
                measure_on_the_way(session)
        if event.step in snapshot_steps(setup):
            keep_snapshot(session, at="epoch")
        over = not last and _patience_is_over(session)
        is_best = progress.best.get("step") == event.step  # the best is kept only if it was saved
        due = last or over or is_best or event.step % save_every == 0
        if due:
            save(session)
        if over:
            patience = setup.recipe.evaluation.patience
            why = f"{patience} evaluations without a new best (evaluation.patience)"
            session.emit("note", {"text": f"stopped early after step {event.step}: {why}"})
            return
        if not last:
            _stop_if_requested(session, saved=due)


@contextmanager
def _saved_ungraded(session: Session) -> Iterator[None]:
    """A block whose answers are graded, or read by a teacher at an address: where too few have a reward, or it
    is silent, the steps so far are saved, and how to go on is said."""
    try:
        yield
    except (UngradedError, TeacherError) as error:
        save(session)
        way = f"Mend what it needs and go on: {command('resume', session.run.path)}."
        edited = " An edited grader is a new run's." * isinstance(error, UngradedError)
        raise type(error)(f"{error} Saved: step {session.progress.step}. {way}{edited}") from error


def _steps_or_saved(session: Session) -> Iterator[Event]:
    """Yield the steps. If memory runs out for good, save the steps so far and say how to continue."""
    try:
        with _saved_ungraded(session):
            yield from training_steps(session.setup, start=session.progress.step)
    except OutOfMemoryError as error:
        save(session)
        num_layers = len(layers_of(session.setup.model))
        settings = {"train.tokens_per_pass": 1} | ({"train.checkpointed_layers": num_layers} if num_layers else {})
        ways = [WayOut(settings)] if error.step else []  # answers are drawn whole
        way = f"with: {command('resume', session.run.path)} {set_words(settings)}" if ways else "start a new run"
        raise OutOfMemoryError(
            f"{error} Saved: step {session.progress.step}. Resume on a machine with more memory, or {way}",
            step=error.step, lengths=error.lengths, peak=error.peak, ways=ways,
        ) from error  # fmt: skip


def _halved(event: Event) -> str:
    tokens, peak = event.values["tokens_per_pass"], event.timing["peak_bytes"]
    return (
        f"out of memory in step {event.step} ({size(peak)} at most): it was retried, and training continues, "
        f"with micro-batches of at most {tokens:,} tokens; the update is the same but for dropout: "
        "tunesmith explain out-of-memory"
    )


def _evaluation_is_due(setup: Setup, step: int) -> bool:
    """Every `evaluation.every` steps, and at the last step if it may be the best."""
    every = setup.recipe.evaluation.every
    if not isinstance(every, int):
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
        weights = broadcast(setup, _weights_of(session, best["step"]))
        if weights is None:
            return
        restore(setup.attachment, weights)
    progress.kept = {"step": best["step"], "reason": f"the best evaluation: {value}"}
    session.emit("note", {"text": f"kept: step {best['step']}, {progress.kept['reason']}"})


def _weights_of(session: Session, step: int) -> dict[str, Tensor] | None:
    """Weights of a checkpoint, read by the first rank; None where they are lost, which a note says."""
    if not session.setup.world.is_first:
        return None
    try:
        return checkpoint.load(session.run.checkpoints_path / f"step-{step}").weights
    except CheckpointError as error:
        session.emit("note", {"text": f"the best step's checkpoint is lost, the last step is kept: {error}"})
        return None


def _stop_if_requested(session: Session, *, saved: bool) -> None:
    setup, step = session.setup, session.progress.step
    if setup.world.stops if setup.world.size > 1 else setup.world.wants_stop():
        if not saved:
            save(session)
        if step and setup.recipe.checkpoint.snapshots and step not in snapshot_steps(setup):
            try:
                keep_snapshot(session, at="stop")
            except StorageError as error:  # the checkpoint is there, and nothing is lost
                session.emit("note", {"text": f"the result at the stop is not kept: {error}"})
        done = f"stopped after step {step} of {setup.total_steps}"
        raise Stopped(f"{done}; resume with: {command('resume', session.run.path)}")
