"""The one dispatcher of a store: takes waiting jobs, projects in turn, and sees each run to its end.

What it does can be done again after any kill: a run is an ordinary run folder, events have ids that follow from the
run, and a job changes its state in one transaction with everything that belongs to it.
"""

from __future__ import annotations

import base64
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.errors import InputError, RunError, StorageError
from tunesmith.jobs.bases import Bases
from tunesmith.jobs.engines import EnginesFromThread
from tunesmith.jobs.file_checks import MOST_ATTEMPTS, FileChecks, fail
from tunesmith.jobs.job_request import Integration
from tunesmith.jobs.launcher import ChildProcess, LocalLauncher
from tunesmith.jobs.names import derived_id, snapshot_name
from tunesmith.jobs.ray_launcher import RayLauncher, RayRun
from tunesmith.jobs.run_events import EventTranslator, metrics_by_step, missing_exports, results_file, trained_tokens
from tunesmith.jobs.states import WAITING
from tunesmith.jobs.store import Store, event
from tunesmith.jobs.tables import files, jobs, models
from tunesmith.jobs.training_files import problems_of, row_fault
from tunesmith.runs.atomic import remove, sha256_file, write_atomic
from tunesmith.runs.events import Tail
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Event, JsonObject, Record

POLL_S = 0.2
EXPIRE_S = 60.0
UNAVAILABLE = 503
CRASHED = "engine_crashed"


@dataclass
class _Active:
    """A run under way."""

    job: str
    project: str
    run: Run
    process: ChildProcess | RayRun
    tail: Tail
    translate: EventTranslator
    is_unwanted: bool = False
    """Whether its job is not running any more."""


@dataclass
class Dispatcher:
    """Moves jobs on, one `round` after another; `run` does that until `stop` is set."""

    store: Store
    bases: Bases
    launcher: LocalLauncher | RayLauncher
    models: EnginesFromThread
    on_note: Callable[[str], None] = lambda text: None
    parallel: int = 1
    active: dict[str, _Active] = field(default_factory=dict)
    last_start: dict[str, float] = field(default_factory=dict)
    """The time of the last start of a project."""
    expires_next: float = 0.0
    unserved: set[str] = field(default_factory=set)
    """Jobs with results at ends of epochs, or at a stop, that may not be served yet."""
    unfinished: dict[str, Record | None] = field(default_factory=dict)
    """Jobs whose runs are done, and whose results wait for an engine, with the errors of their exports."""
    crashes: Counter[str] = field(default_factory=Counter)
    """Crashes of the engine while the result of a job was put on it. What befell the run does not count here."""
    waiting: set[str] = field(default_factory=set)
    """Jobs that waited or were paused at the last round."""
    seen: int = -1
    """Version of the store at the last round, after which there is nothing to do until it is another."""

    def __post_init__(self) -> None:
        self.checks = FileChecks(self.store, self.bases)

    def recover(self) -> None:
        """Take over the runs of an earlier server. Before the first round."""
        for line in self.store.sweep(with_uploads=True):
            self.on_note(line)
        self.store.sweep_models()
        self.checks.recover()
        for job in self.store.with_status("running", "paused", "cancelled", "queued"):
            self.unserved.add(job["id"])
            if (process := self.launcher.find(self._run_path(job["id"]))) is not None:
                self._follow_new(job, process)
        for path in self.store.runs_path.glob("ftjob-*/checkpoints"):  # of jobs that ended in the last moment
            if path.parent.name not in self.active:
                self._tidy(path.parent.name)

    def run(self, stop: threading.Event) -> None:
        """Work until `stop`. Runs under way then stop after their step, and go on under the next server."""
        last = ""
        while not stop.wait(POLL_S):
            try:
                self.round()
                last = ""
            except Exception as error:  # a full disk, say: the next round may succeed, and jobs lose nothing
                if (text := f"jobs: {type(error).__name__}: {error}") != last:  # said once, however long it lasts
                    self.on_note(text)
                last = text
                stop.wait(5 * POLL_S)
        self.checks.close()
        for active in self.active.values():
            active.process.stop()

    def round(self) -> None:
        """Follow every run, then start what there is room for."""
        # 1. Has anything changed since the last round? Until the end -1: whatever fails is looked at again.
        version, before, self.seen = self.store.version, self.seen, -1
        is_new = version != before
        # 2. Follow the runs and the checks of files that are at work.
        for active in list(self.active.values()):
            is_new |= self._follow(active, is_new=is_new)
        is_new |= self.checks.follow()
        # 3. Serve checkpoints that waited for their engine.
        for name in list(self.unserved):
            try:
                self._serve_snapshots(name, Run(self._run_path(name)))
            except RequestError:  # no engine now
                continue
            except RunError as error:
                self.on_note(f"{name}: its checkpoints are not served: {error}")
            self.unserved.discard(name)
        # 4. Finish jobs whose results waited for their engine.
        for name, failed in list(self.unfinished.items()):
            job = self.store.job(name) or {}
            del self.unfinished[name]
            if job["status"] == "running":
                self._finish(name, Run(self._run_path(name)), failed)
            self._tidy(name)
        # 5. Start what there is room for, and once in a while delete what has expired.
        if is_new:
            self._start_jobs()
        if time.monotonic() >= self.expires_next:
            self.expires_next = time.monotonic() + EXPIRE_S
            for line in self.store.expire():
                self.on_note(line)
        self.seen = version

    def _start_jobs(self) -> None:
        """Start what there is room for, and tidy after what waits no longer."""
        for job in self.store.with_status("running"):
            if job["id"] not in (*self.active, *self.unfinished):  # an earlier server, or a full disk, left it so
                self.store.change_job(job["id"], if_status=["running"], status="queued")
        waiting = {job["id"] for job in self.store.with_status("paused", *WAITING)}
        for name in self.waiting - waiting - self.active.keys():
            self._tidy(name)
        self.waiting = waiting
        self.checks.begin(job for job in self.store.with_status(*WAITING) if not job["is_checked"])
        self.checks.follow()
        for job in self._in_turn():
            if len(self.active) < self.parallel and self._may_run(job):
                self._begin(job)

    def _in_turn(self) -> list[Record]:
        """Jobs that wait and are checked, the projects in turn, and each project's oldest first."""
        places = Counter(active.project for active in self.active.values())
        ready = (job for job in self.store.with_status(*WAITING) if job["is_checked"])
        waiting = [job for job in ready if job["id"] not in self.active]
        order = {}
        for job in waiting:
            order[job["id"]] = (places[job["project"]], self.last_start.get(job["project"], 0), job["seq"])
            places[job["project"]] += 1
        return sorted(waiting, key=lambda job: order[job["id"]])

    def _may_run(self, job: Record) -> bool:
        most = self.store.rules.of(job["project"]).jobs_running
        return most is None or sum(active.project == job["project"] for active in self.active.values()) < most

    def _run_path(self, job: str) -> Path:
        return self.store.runs_path / job

    # Start

    def _begin(self, job: Record) -> None:
        name = job["id"]
        run = Run(self._run_path(name))
        messages = [event(name, "Fine-tuning job started", once="started")]
        if not self.store.change_job(name, messages, if_status=WAITING, status="running"):
            return
        if (run.path / "run.json").exists() and run.state() == "done":
            return self._finish(name, run)
        run.clear_stop()
        path = self.store.recipes_path / f"{name}.yaml"
        services = [
            Integration.model_validate(integration).wandb.environment for integration in job["request"]["integrations"]
        ]
        environment = services[0] if services else {}  # for the service that gets the metrics
        self._follow_new(job, self.launcher.start(run.path, path, environment))

    def _follow_new(self, job: Record, process: ChildProcess | RayRun) -> None:
        name, run = job["id"], Run(self._run_path(job["id"]))
        self.active[name] = _Active(name, job["project"], run, process, Tail(run.events_path), EventTranslator(name))
        self.last_start[job["project"]] = time.monotonic()

    # Follow

    def _follow(self, active: _Active, *, is_new: bool) -> bool:
        """Whether it has ended."""
        try:
            self._follow_run(active, is_new=is_new)
        except InputError as error:  # its folder is damaged, which is not a reason for other jobs to wait
            active.process.stop()
            if not active.process.is_alive():
                self.active.pop(active.job, None)
                fail(self.store, active.job, "run_failed", str(error))
        return active.job not in self.active

    def _follow_run(self, active: _Active, *, is_new: bool) -> None:
        ended = not active.process.is_alive()
        self._relay(active)
        if not (ended or is_new or active.is_unwanted):
            return
        job = self.store.job(active.job)
        assert job is not None, "rows of jobs are never removed"
        active.is_unwanted = job["status"] != "running"
        if active.is_unwanted and not (ended or active.run.stop_asked()):
            active.process.stop()  # again: a process that has just started may have no folder, or clears a request
        if ended:
            del self.active[active.job]
            if job["status"] == "running":
                self._end(job, active)
            self._tidy(active.job)

    def _relay(self, active: _Active) -> None:
        """Take over what the run says. If the store fails in between, all of it is taken over again."""
        new_events = list(active.tail.read())
        if not new_events:
            return
        try:
            self._take_over(active, new_events)
        except BaseException:
            active.tail, active.translate = Tail(active.run.events_path), EventTranslator(active.job)
            raise

    def _take_over(self, active: _Active, run_events: Sequence[Event]) -> None:
        self.store.add_events(active.translate(run_events))
        saved = max((event.step for event in run_events if event.kind == "checkpoint"), default=-1)
        if saved >= 0 and saved > (self.store.job(active.job) or {})["last_checkpoint"]:  # each start reads all
            self.store.change_job(active.job, if_status=["running"], last_checkpoint=saved, attempts=0)
        if any(event.kind == "plan" for event in run_events):
            self._take_numbers(active)
        if any(event.kind == "snapshot" for event in run_events):
            self.unserved.add(active.job)

    def _take_numbers(self, active: _Active) -> None:
        """The hyperparameters that were chosen."""
        job, recipe = self.store.job(active.job) or {}, active.run.recipe()
        times = job["numbers"]["learning_rate_multiplier"]
        numbers = {
            "n_epochs": int(float(recipe.train.epochs)), "batch_size": recipe.train.rows_per_step,
            "learning_rate_multiplier": 1.0 if times == "auto" else times,
        }  # fmt: skip
        if "beta" in job["numbers"]:
            numbers["beta"] = recipe.prefer.filled().beta
        self.store.change_job(active.job, if_status=["running", "paused"], numbers=numbers)

    def _end(self, job: Record, active: _Active) -> None:
        """The state of a job whose run has ended by itself."""
        name = job["id"]
        error = active.process.error()
        if (active.run.path / "run.json").exists() and active.run.state() == "done":
            return self._finish(name, active.run, error)
        if error is not None and error["code"] == "Stopped":  # by the end of a server
            self.store.change_job(name, if_status=["running"], status="queued")
            return None
        if error is not None:
            return self._fail_by(job, error)
        attempts = job["attempts"] + 1
        if attempts >= MOST_ATTEMPTS:
            message = f"The run was ended from outside {attempts} times without a new checkpoint between."
            return fail(self.store, name, "run_crashed", message)
        messages = [event(name, "Fine-tuning job will be started again: its run was ended from outside", level="warn")]
        self.store.change_job(name, messages, if_status=["running"], status="queued", attempts=attempts)
        return None

    def _fail_by(self, job: Record, error: JsonObject) -> None:
        for which in ("training", "validation"):
            file = job["request"][f"{which}_file"]
            if file is not None and (problems := list(problems_of(error, self.store.content_path(file)))):
                fault = row_fault(problems, which)
                return fail(self.store, job["id"], fault.code, fault.message, param=fault.param, lines=fault.lines)
        code, param = ("insufficient_memory", "model") if error["code"] == "DoesNotFitError" else ("run_failed", None)
        return fail(self.store, job["id"], code, self._message(error), param=param)

    def _message(self, error: Record) -> str:
        """The message of a run's error, for clients."""
        return str(error["message"]).replace(f"{self.store.folder}/", "")

    def _serve_snapshots(self, name: str, run: Run) -> None:
        """Put results at ends of epochs and at the newest stop on their base, once each; remove those at earlier stops.

        Raises RequestError while there is no engine.
        """
        job = self.store.job(name)
        assert job is not None, "rows of jobs are never removed"
        if job["status"] == "cancelled" or not run.events_path.exists():
            return
        run_events = list(run.events())
        metrics, snapshots = metrics_by_step(run_events), _snapshots(job, run_events)
        stops = [tuned for tuned, snapshot in snapshots.items() if snapshot.values.get("at") == "stop"]
        for tuned, snapshot in snapshots.items():
            if tuned in stops[:-1] or self.store.one(models, name=tuned) is not None:
                continue
            try:
                self.models.attach(job["base"], tuned, run.path / snapshot.values["path"])
            except Exception as error:
                if _is_unavailable(error):
                    raise
                refusal = event(
                    name, f"{tuned}: cannot be served: {error}", level="warn", once=f"refused {snapshot.step}"
                )
                self.store.add_events([refusal])
                continue
            text = f"Checkpoint created at step {snapshot.step} with Snapshot ID: {tuned}"
            place = {"name": tuned, "job": name, "base": job["base"], "project": job["project"]}
            model = {**place, "step": snapshot.step, "metrics": metrics[snapshot.step]}
            self.store.add_model(model, [event(name, text, once=f"snapshot {snapshot.step}")])
        if not stops or self.store.one(models, name=stops[-1]) is None:
            return  # the newest is refused: the one before stays
        for tuned in stops[:-1]:
            row = self.store.one(models, name=tuned)
            if row is None:  # it was never served
                remove(run.path / snapshots[tuned].values["path"])
            elif row["deleted_at"] is None:
                self.models.detach(tuned)
                self.store.delete_model(tuned)
                self.store.sweep_models()

    def _write_results(self, name: str, found: Iterable[Event]) -> Record:
        """The row of the results file, whose content is written."""
        file, content = derived_id("file-", name, "results"), results_file(found)
        if self.bases.results_encoding == "base64":
            content = base64.b64encode(content)
        path = self.store.content_path(file)
        write_atomic(path, content)
        facts = {"purpose": "fine-tune-results", "filename": "step_metrics.csv", "bytes": len(content)}
        return {"id": file, **facts, "sha256": sha256_file(path)}

    def _tidy(self, name: str) -> None:
        """Remove what only a further step would need of a job that has succeeded, or was cancelled: then the results
        of its steps are written, and what it made at its stop goes."""
        job, run = self.store.job(name), Run(self._run_path(name))
        if job is None or job["status"] not in ("succeeded", "cancelled"):
            return
        try:  # The result and the report stay.
            for path in (run.rows_path, *run.checkpoints_path.glob("*")):  # first: the disk may be full
                remove(path)
            if job["status"] == "cancelled" and run.events_path.exists():
                self._write_cancelled(job, run)
            for path in (run.checkpoints_path, run.path / "lock.json"):  # a killed run leaves who wrote it
                remove(path)
        except (OSError, RunError, StorageError) as error:
            lost = "the results of its steps are not kept"
            if job["status"] == "succeeded":
                lost = "what it no longer needs cannot be removed"
            self.on_note(f"{name}: {lost}: {error}")

    def _write_cancelled(self, job: Record, run: Run) -> None:
        """Write the results file of a cancelled job, and remove what it made at its stop."""
        name, run_events = job["id"], list(run.events())
        if any(event.kind == "step" for event in run_events):
            row = self._write_results(name, run_events)
            self.store.insert(files, {**row, "project": job["project"]})
            self.store.update(jobs, {"result_file": row["id"]}, id=name)
        for tuned, snapshot in _snapshots(job, run_events).items():
            if self.store.one(models, name=tuned) is None:
                remove(run.path / snapshot.values["path"])

    def _finish(self, name: str, run: Run, failed: Record | None = None) -> None:
        """Results file, model on its base, and then the state: who reads `succeeded` can ask the model.

        `failed`: the error of its exports.
        """
        job = self.store.job(name)
        assert job is not None, "rows of jobs are never removed"
        tuned = job["tuned_name"]
        try:
            self._serve_snapshots(name, run)
            self.models.attach(job["base"], tuned, run.path)
        except Exception as error:
            self.crashes[name] += getattr(error, "code", "") == CRASHED
            if _is_unavailable(error) and self.crashes[name] < MOST_ATTEMPTS:
                self.unfinished[name] = failed
                return None
            return fail(self.store, name, "result_not_served", f"The result cannot be served: {error}")
        run_events = list(run.events())
        self.store.add_events(EventTranslator(name)(run_events))
        row = self._write_results(name, run_events)
        step, metrics = max(metrics_by_step(run_events).items())
        model = {"name": tuned, "job": name, "base": job["base"], "step": step, "metrics": metrics}
        messages = [
            event(name, f"Checkpoint created at step {step} with Snapshot ID: {tuned}", once="snapshot"),
            event(name, f"New fine-tuned model created: {tuned}", once="model"),
            *missing_exports(name, run, "" if failed is None else self._message(failed)),
            event(name, "The job has successfully completed", once="completed"),
        ]
        if not self.store.succeed(name, messages, model=model, result=row, trained_tokens=trained_tokens(run_events)):
            return self.models.detach(tuned)  # it was paused or cancelled in the last moment
        self.store.sweep()
        self.store.sweep_models()
        return None


def _snapshots(job: Record, run_events: Iterable[Event]) -> dict[str, Event]:
    """Results of a run before its last step, by the names that they are served by, oldest first."""
    start, suffix = (job["model"], job["project"]), job["request"]["suffix"]
    return {
        snapshot_name(*start, suffix, job["id"], run_event.step): run_event
        for run_event in run_events
        if run_event.kind == "snapshot"
    }


def _is_unavailable(error: Exception) -> bool:
    """Whether an engine is being started again, or was killed meanwhile."""
    return isinstance(error, RequestError) and (error.status == UNAVAILABLE or error.code == CRASHED)
