"""A sweep: its folder, the loop that runs and judges its trials, and what came of each.

    runs/lr/          sweep.json (which trials were stopped or failed, and why), recipes/, lock
    runs/lr-01/ ...   its trials, ordinary runs

Everything else is read from the run folders, so that a sweep which was killed continues where its trials are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import filelock

from tunesmith.errors import InputError, RunError, Stopped
from tunesmith.evaluation.metrics import info_of
from tunesmith.phrases import plural
from tunesmith.recipe.docs import as_yaml
from tunesmith.runs.atomic import from_json, storing, to_json, write_atomic
from tunesmith.runs.folder import Run
from tunesmith.sweeps.grid import Grid, Judge, Trial
from tunesmith.sweeps.trial import Follower, Job, OneByOne, TrialRunner
from tunesmith.types import JsonObject, Record

SWEEP_FORMAT = 1
STATE = "sweep.json"


@dataclass(frozen=True)
class Outcome:
    """The result of a trial."""

    trial: Trial
    state: str
    """done, stopped (by its rung), failed, running, or new."""
    reason: str
    """Why it stopped or failed."""
    step: int
    total: int
    measure: Mapping[str, float] | None
    """The sweep's metric as {"value", "low", "high"}: of the result, or of the last evaluation."""


@dataclass
class Watch:
    """Callbacks of a sweep."""

    say: Callable[[str], None] = lambda text: None
    """A line for each thing that happened."""
    status: Callable[[str], None] = lambda text: None
    """Shows the trials under way."""
    should_stop: Callable[[], bool] = lambda: False
    poll_s: float = 0.5


@dataclass
class Sweep:
    """A grid and its folders below `root`."""

    grid: Grid
    root: Path
    offline: bool = False
    stopped: dict[str, JsonObject] = field(default_factory=dict)
    """Trial → the rung that stopped it."""
    failed: dict[str, str] = field(default_factory=dict)
    """Trial → why it failed."""
    followers: dict[str, Follower] = field(default_factory=dict)
    judge: Judge | None = None

    def __post_init__(self) -> None:
        grid = self.grid
        self.followers = {trial.name: Follower(Run(self.root / trial.name)) for trial in grid.trials}
        if grid.asha is not None and grid.every is not None:
            self.judge = Judge(grid.asha, grid.every, info_of(grid.metric).better == "lower")

    @property
    def path(self) -> Path:
        return self.root / self.grid.name

    def job(self, trial: Trial) -> Job:
        """The trial's work, by absolute paths."""
        recipe = self.path.absolute() / "recipes" / f"{trial.name}.yaml"
        return Job(trial.name, (self.root / trial.name).absolute(), recipe, Path.cwd(), self.offline)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Make the folder or go on with it; one process at a time.

        Raises RunError if another sweep or a process is in it, and InputError if a trial's folder is taken.
        """
        self._refuse_other()
        with storing(self.path):
            (self.path / "recipes").mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / "lock", timeout=1, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise RunError(f"{self.path}: another process runs this sweep. Wait for it, or stop it.") from None
        try:
            if not (self.path / STATE).exists():
                self._save()
            for trial in self.grid.trials:
                write_atomic(self.job(trial).recipe, as_yaml(trial.recipe, comments=False).encode())
            yield
        finally:
            lock.release()

    def _refuse_other(self) -> None:
        state = self.path / STATE
        if state.is_file():
            saved = from_json(state.read_bytes())
            is_same = saved.get("format") == SWEEP_FORMAT and saved.get("digest") == self.grid.digest
            if not is_same and not any((self.root / name).exists() for name in saved["trials"]):
                state.unlink()  # none of its trials began
                return
            if not is_same:
                raise RunError(
                    f"{self.path}: holds a sweep of another grid (the file was changed since). Choose another "
                    "folder with --name, or put the file back to go on with it."
                )
            self.stopped, self.failed = dict(saved["stopped"]), dict(saved["failed"])
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise RunError(f"{self.path}: is there already and is not a sweep. Choose another folder with --name.")
        taken = [trial.name for trial in self.grid.trials if (self.root / trial.name).exists()]
        if taken:
            raise RunError(f"{self.root / taken[0]}: is there already. Choose other names with --name.")

    def _save(self) -> None:
        trials = {trial.name: dict(trial.options) for trial in self.grid.trials}
        values = {"format": SWEEP_FORMAT, "digest": self.grid.digest, "metric": self.grid.metric, "trials": trials}
        write_atomic(
            self.path / STATE, to_json({**values, "stopped": self.stopped, "failed": self.failed}, indent=True)
        )

    def run(self, engine: TrialRunner | None = None, watch: Watch | None = None) -> None:
        """Run what is left of every trial, in the order of the grid.

        Raises Stopped, after the trials at work have saved a checkpoint, on a request to stop, and InputError
        if a trial is refused before any has made its run and no other is getting ready.
        """
        engine, watch = engine or OneByOne(), watch or Watch()
        waiting, running = self._left(watch), list[Trial]()
        while waiting or running:
            stopping = watch.should_stop()
            while waiting and not stopping and len(running) < engine.slots and not (running and self._is_doubtful()):
                trial = waiting.pop(0)
                watch.say(f"trial {trial.name}: {options_text(trial.options)}")
                engine.start(self.job(trial))
                running.append(trial)
            ended = engine.ended()
            for trial in list(running):
                self._hear(trial, watch)
                if trial.name in ended:
                    running.remove(trial)
                    is_over = stopping or watch.should_stop()
                    self._conclude(trial, ended[trial.name], watch, is_over=is_over, is_alone=not running)
                elif stopping or trial.name in self.stopped:
                    run = self.followers[trial.name].run
                    if run.is_locked() and not run.stop_asked():
                        run.ask_stop()
            if stopping and not running:
                done = sum(self.outcome(trial).state == "done" for trial in self.grid.trials)
                raise Stopped(f"stopped with {done} of {plural(len(self.grid.trials), 'trial')} done")
            watch.status("  ".join(self._at(trial) for trial in running))
            if running:
                time.sleep(watch.poll_s)

    def _left(self, watch: Watch) -> list[Trial]:
        """Trials that are neither done nor stopped nor failed for good; others' measures come first."""
        left, over = [], 0
        for trial in self.grid.trials:
            self._hear(trial, Watch())
            if self.followers[trial.name].run.state() == "done":
                self.stopped.pop(trial.name, None)
                self.failed.pop(trial.name, None)
                over += 1
            elif trial.name in self.stopped or (trial.name in self.failed and self._has_run(trial)):
                over += 1
            else:
                left.append(trial)
        if over and left:
            watch.say(f"{over} of {plural(len(self.grid.trials), 'trial')} ended before; {len(left)} left")
        return left

    def _is_doubtful(self) -> bool:
        """Whether a trial was refused and none has made its run yet: what is wrong may be so with all."""
        return bool(self.failed) and not any(map(self._has_run, self.grid.trials))

    def _has_run(self, trial: Trial) -> bool:
        return (self.root / trial.name / "run.json").is_file()

    def _hear(self, trial: Trial, watch: Watch) -> None:
        """Read what a trial measured meanwhile, and stop it if it is not among the best of a rung."""
        follower, metric = self.followers[trial.name], info_of(self.grid.metric)
        for step, measures in follower.read():
            value = measures.get(self.grid.metric, {}).get("value", math.nan)
            watch.say(f"{trial.name}: step {step}: {metric.label} {metric.text(value)}")
            verdict = self.judge.hear(trial.name, step, value) if self.judge else None
            if verdict is not None and trial.name not in self.stopped and follower.run.state() != "done":
                self.stopped[trial.name] = {**verdict, "time": time.time()}
                self._save()
                watch.say(f"{trial.name}: stops: {self._why_stopped(trial)}")

    def _why_stopped(self, trial: Trial) -> str:
        at = self.stopped[trial.name]
        metric = info_of(self.grid.metric)
        return f"{metric.label} {metric.text(at['value'])} at step {at['step']} was place {at['rank']} of {at['of']}"

    def _conclude(self, trial: Trial, failure: str, watch: Watch, *, is_over: bool, is_alone: bool) -> None:
        run = self.followers[trial.name].run
        if run.state() == "done":  # before it heard that it should stop
            self.stopped.pop(trial.name, None)
            self.failed.pop(trial.name, None)
        elif trial.name not in self.stopped and not is_over:
            self.failed[trial.name] = failure or "stopped by somebody else"
            if failure and is_alone and self._is_doubtful():
                raise InputError(f"trial {trial.name} ({options_text(trial.options)}) cannot be run: {failure}")
        self._save()
        outcome = self.outcome(trial)
        info = info_of(self.grid.metric)
        value = "" if outcome.measure is None else f", {info.label} {info.whole(outcome.measure)}"
        why = f": {outcome.reason}" if outcome.state == "failed" else ""
        watch.say(f"{trial.name}: {outcome.state} after step {outcome.step}{value}{why}")

    def _at(self, trial: Trial) -> str:
        follower = self.followers[trial.name]
        return (
            f"{trial.name}: step {follower.step}/{follower.total}" if follower.step else f"{trial.name}: getting ready"
        )

    def outcome(self, trial: Trial) -> Outcome:
        """The outcome of a trial so far."""
        follower = self.followers[trial.name]
        follower.read()
        state, reason = follower.run.state() if self._has_run(trial) else "new", ""
        if state != "done" and trial.name in self.stopped:
            state, reason = "stopped", self._why_stopped(trial)
        elif state != "done" and trial.name in self.failed:
            state, reason = "failed", self.failed[trial.name].splitlines()[0]
        measure = (follower.after if state == "done" else follower.last).get(self.grid.metric)
        return Outcome(trial, state, reason, follower.step, follower.total, measure)

    def outcomes(self) -> list[Outcome]:
        """Every trial, best first: those that are done by their measure, then others as far as they came."""
        sign = 1 if info_of(self.grid.metric).better == "lower" else -1

        def order(outcome: Outcome) -> tuple[bool, float]:
            value = sign * outcome.measure["value"] if outcome.measure else math.inf
            return outcome.state != "done", value if math.isfinite(value) else math.inf

        return sorted((self.outcome(trial) for trial in self.grid.trials), key=order)


def best_of(outcomes: list[Outcome]) -> Outcome:
    """The best trial that is done. Raises InputError with the reasons if none is."""
    first = outcomes[0]
    if first.state == "done":
        return first
    reasons = dict.fromkeys(outcome.reason for outcome in outcomes if outcome.reason)
    raise InputError("\n".join(["no trial of this sweep ended well.", *reasons]))


def options_text(options: Record) -> str:
    """Options as they are set on a command line: optim.lr=0.0001 method.rank=8."""
    from tunesmith.recipe.yaml_io import dump

    return " ".join(f"{key}={dump(value)}" for key, value in options.items())
