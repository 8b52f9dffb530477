"""The one dispatcher of a store: starts waiting jobs, projects in turn, and follows each run to its end.

A kill at any moment loses nothing, since all can be done again: a run is an ordinary run folder, ids of events
follow from the run, and a job changes its state in one transaction with everything that belongs to it.
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
from tunesmith.jobs import reinforcement
from tunesmith.jobs.bases import Bases
from tunesmith.jobs.engines import EnginesFromThread
from tunesmith.jobs.file_checks import MOST_ATTEMPTS, FileChecks, fail_job, without_paths
from tunesmith.jobs.job_request import GRADER, Integration
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
"""Seconds between two rounds that delete expired files."""
_ERRORS = {"DoesNotFitError": ("insufficient_memory", "model"), "UngradedError": ("grader_failed", GRADER)}
"""(code, param) of a failed job, by the type of the error that ended its run; other types are run_failed."""
UNAVAILABLE, CRASHED = 503, "engine_crashed"
"""Refusals of an engine: the status while it is being started, the code if it ended during the request."""


@dataclass
class _Active:
    """A run at work."""

    job_id: str
    project: str
    run: Run
    process: ChildProcess | RayRun
    tail: Tail
    """Reads the events that the run has added since the last round."""
    translate: EventTranslator
    is_unwanted: bool = False
    """Whether its job was paused or cancelled, so that the run has to stop."""


@dataclass
class Dispatcher:
    """Moves jobs on, one `round` after another; `run` does that until `stop` is set. Keys of its mappings and
    members of its sets are ids of jobs, unless a field says otherwise."""

    store: Store
    bases: Bases
    launcher: LocalLauncher | RayLauncher
    engines: EnginesFromThread
    """Serves tuned models, each on its base."""
    on_note: Callable[[str], None] = lambda text: None
    parallel: int = 1
    """Maximum number of runs at once."""
    active: dict[str, _Active] = field(default_factory=dict)
    last_start: dict[str, float] = field(default_factory=dict)
    """The time at which the newest run of each project was started, by project."""
    expires_next: float = 0.0
    """The time from which expired files are deleted again."""
    unserved: set[str] = field(default_factory=set)
    """Jobs whose snapshots (results at ends of epochs, or at a stop) may not all be served yet."""
    unfinished: dict[str, Record | None] = field(default_factory=dict)
    """Jobs whose runs are done and whose results wait for an engine, each with the error of its exports."""
    crashes: Counter[str] = field(default_factory=Counter)
    """Number of times that the engine crashed while it loaded the result of a job. Crashes of the run itself
    are counted in the job, as `attempts`."""
    waiting: set[str] = field(default_factory=set)
    """Jobs that waited or were paused at the last round."""
    version: int = -1
    """Version of the store up to which all work was done; -1: no round has ended yet, or the last one
    failed."""

    def __post_init__(self) -> None:
        self.checks = FileChecks(self.store, self.bases)

    def recover(self) -> None:
        """Take over the runs of an earlier server. Called once, before the first round."""
        for line in self.store.remove_unused(with_uploads=True):
            self.on_note(line)
        self.store.remove_unused_weights()
        self.checks.recover()
        for job in self.store.with_status("running", "paused", "cancelled", "queued"):
            self.unserved.add(job["id"])
            if (process := self.launcher.find(self._run_path(job["id"]))) is not None:
                self._follow_new(job, process)
        # The earlier server may have been killed between the end of a job and `_tidy`.
        for path in self.store.runs_path.glob("ftjob-*/checkpoints"):
            if path.parent.name not in self.active:
                self._tidy(path.parent.name)

    def run(self, stop: threading.Event) -> None:
        """Work until `stop`. Runs at work then stop after their step, and continue under the next server."""
        last_problem = ""
        while not stop.wait(POLL_S):
            try:
                self.round()
                last_problem = ""
            except Exception as error:  # a full disk, say: the next round may succeed, and jobs lose nothing
                problem = f"jobs: {type(error).__name__}: {error}"
                if problem != last_problem:  # noted once, however long it lasts
                    self.on_note(problem)
                last_problem = problem
                stop.wait(5 * POLL_S)
        self.checks.close()
        for active in self.active.values():
            active.process.stop()

    def round(self) -> None:
        """Follow every run, then start as many as `parallel` allows."""
        # 1. Has the store changed since the last round? A round that raises leaves -1: the next looks at all.
        version, last_version, self.version = self.store.version, self.version, -1
        is_new = version != last_version
        # 2. Follow the runs and the checks of files that are at work.
        for active in list(self.active.values()):
            is_new |= self._follow(active, is_new=is_new)
        is_new |= self.checks.follow()
        # 3. Serve checkpoints that waited for their engine.
        for job_id in list(self.unserved):
            try:
                self._serve_snapshots(job_id, Run(self._run_path(job_id)))
            except RequestError:  # no engine now: the next round tries again
                continue
            except RunError as error:
                self.on_note(f"{job_id}: its checkpoints are not served: {error}")
            self.unserved.discard(job_id)
        # 4. Finish jobs whose results waited for their engine.
        for job_id, export_error in list(self.unfinished.items()):
            del self.unfinished[job_id]
            if self._job(job_id)["status"] == "running":
                self._finish(job_id, Run(self._run_path(job_id)), export_error)
            self._tidy(job_id)
        # 5. Start runs, and once in a while delete files that have expired.
        if is_new:
            self._start_jobs()
        if time.monotonic() >= self.expires_next:
            self.expires_next = time.monotonic() + EXPIRE_S
            for line in self.store.expire():
                self.on_note(line)
        self.version = version

    def _start_jobs(self) -> None:
        """Start as many runs as `parallel` allows, and tidy after jobs that wait no longer."""
        for job in self.store.with_status("running"):
            # The server, or a round on a full disk, ended before the run of this job was followed.
            if job["id"] not in (*self.active, *self.unfinished):
                self.store.change_job(job["id"], if_status=["running"], status="queued")
        waiting = {job["id"] for job in self.store.with_status("paused", *WAITING)}
        for job_id in self.waiting - waiting - self.active.keys():
            self._tidy(job_id)
        self.waiting = waiting
        self.checks.begin(job for job in self.store.with_status(*WAITING) if not job["is_checked"])
        self.checks.follow()
        for job in self._in_turn():
            if len(self.active) < self.parallel and self._may_run(job):
                self._begin(job)

    def _in_turn(self) -> list[Record]:
        """Checked jobs that wait, in the order in which they start: projects take turns.

        A job comes the earlier, the fewer jobs of its project come before it: running ones, and older ones that
        wait. Between projects with equally many, the one whose last start is longest ago comes first.
        """
        num_earlier = Counter(active.project for active in self.active.values())
        checked = (job for job in self.store.with_status(*WAITING) if job["is_checked"])
        waiting = [job for job in checked if job["id"] not in self.active]
        ranks = {}
        for job in waiting:
            project = job["project"]
            ranks[job["id"]] = (num_earlier[project], self.last_start.get(project, 0), job["seq"])
            num_earlier[project] += 1
        return sorted(waiting, key=lambda job: ranks[job["id"]])

    def _may_run(self, job: Record) -> bool:
        """Whether the rules of its project allow one more run."""
        limit = self.store.rules.of(job["project"]).jobs_running
        num_running = sum(active.project == job["project"] for active in self.active.values())
        return limit is None or num_running < limit

    def _run_path(self, job_id: str) -> Path:
        return self.store.runs_path / job_id

    def _job(self, job_id: str) -> Record:
        job = self.store.job(job_id)
        assert job is not None, "rows of jobs are never removed"
        return job

    # Start

    def _begin(self, job: Record) -> None:
        """Start the run of a job, or continue it. Where the run is done already, only finish the job."""
        job_id = job["id"]
        run = Run(self._run_path(job_id))
        messages = [event(job_id, "Fine-tuning job started", once="started")]
        if not self.store.change_job(job_id, messages, if_status=WAITING, status="running"):
            return
        if (run.path / "run.json").exists() and run.state() == "done":
            return self._finish(job_id, run)
        run.clear_stop()
        recipe_path = self.store.recipes_path / f"{job_id}.yaml"
        integrations = [Integration.model_validate(integration) for integration in job["request"]["integrations"]]
        wandb_variables = integrations[0].wandb.environment if integrations else {}
        self._follow_new(job, self.launcher.start(run.path, recipe_path, wandb_variables))

    def _follow_new(self, job: Record, process: ChildProcess | RayRun) -> None:
        job_id, run = job["id"], Run(self._run_path(job["id"]))
        tail, translate = Tail(run.events_path), EventTranslator(job_id)
        self.active[job_id] = _Active(job_id, job["project"], run, process, tail, translate)
        self.last_start[job["project"]] = time.monotonic()

    # Follow

    def _follow(self, active: _Active, *, is_new: bool) -> bool:
        """Follow a run. Returns whether it has ended."""
        try:
            self._follow_run(active, is_new=is_new)
        except InputError as error:  # its folder is damaged: other jobs go on
            active.process.stop()
            if not active.process.is_alive():
                self.active.pop(active.job_id, None)
                fail_job(self.store, active.job_id, "run_failed", str(error))
        return active.job_id not in self.active

    def _follow_run(self, active: _Active, *, is_new: bool) -> None:
        ended = not active.process.is_alive()
        self._relay(active)
        if not (ended or is_new or active.is_unwanted):
            return
        job = self._job(active.job_id)
        active.is_unwanted = job["status"] != "running"
        if active.is_unwanted and not (ended or active.run.stop_asked()):
            # In each round, since a process that has just started may lose the request: it has no folder yet, or
            # clears it.
            active.process.stop()
        if ended:
            del self.active[active.job_id]
            if job["status"] == "running":
                self._end(job, active)
            self._tidy(active.job_id)

    def _relay(self, active: _Active) -> None:
        """Put new events of the run into the store. If that fails, the next round reads all its events
        again."""
        new_events = list(active.tail.read())
        if not new_events:
            return
        try:
            self._store_events(active, new_events)
        except BaseException:
            active.tail, active.translate = Tail(active.run.events_path), EventTranslator(active.job_id)
            raise

    def _store_events(self, active: _Active, run_events: Sequence[Event]) -> None:
        """Put events of a run into the store, and change its job by them. Events that the store has already
        change nothing."""
        self.store.add_events(active.translate(run_events))
        saved_steps = [run_event.step for run_event in run_events if run_event.kind == "checkpoint"]
        last_saved = max(saved_steps, default=-1)
        if saved_steps and last_saved > self._job(active.job_id)["last_checkpoint"]:  # the run makes progress
            self.store.change_job(active.job_id, if_status=["running"], last_checkpoint=last_saved, attempts=0)
        kinds = {run_event.kind for run_event in run_events}
        if "plan" in kinds:
            self._store_hyperparameters(active)
        if "snapshot" in kinds:
            self.unserved.add(active.job_id)

    def _store_hyperparameters(self, active: _Active) -> None:
        """Put the hyperparameters that the run has chosen into its job."""
        job, recipe = self._job(active.job_id), active.run.recipe()
        requested = job["numbers"]
        multiplier = requested["learning_rate_multiplier"]
        hyperparameters = {
            "n_epochs": int(float(recipe.train.epochs)),
            "batch_size": recipe.train.rows_per_step,
            "learning_rate_multiplier": 1.0 if multiplier == "auto" else multiplier,
        }
        if "beta" in requested:
            hyperparameters["beta"] = recipe.prefer.filled().beta
        if "compute_multiplier" in requested:
            hyperparameters |= reinforcement.numbers_of(recipe.reinforce, recipe.evaluation)
        self.store.change_job(active.job_id, if_status=["running", "paused"], numbers=hyperparameters)

    def _end(self, job: Record, active: _Active) -> None:
        """Finish a job whose run has ended, let it wait again, or fail it."""
        job_id = job["id"]
        error = active.process.error()
        if (active.run.path / "run.json").exists() and active.run.state() == "done":
            return self._finish(job_id, active.run, error)
        if error is not None and error["code"] == "Stopped":  # a server that ended stopped it
            self.store.change_job(job_id, if_status=["running"], status="queued")
            return None
        if error is not None:
            return self._fail_with(job, error)
        attempts = job["attempts"] + 1
        if attempts >= MOST_ATTEMPTS:
            message = f"The run was ended from outside {attempts} times without a new checkpoint between."
            return fail_job(self.store, job_id, "run_crashed", message)
        message = "Fine-tuning job will be started again: its run was ended from outside"
        messages = [event(job_id, message, level="warn")]
        self.store.change_job(job_id, messages, if_status=["running"], status="queued", attempts=attempts)
        return None

    def _fail_with(self, job: Record, error: JsonObject) -> None:
        """Fail a job with the error that ended its run. An error of rows is reported by file and line."""
        for side in ("training", "validation"):
            file = job["request"][f"{side}_file"]
            if file is not None and (problems := list(problems_of(error, self.store.content_path(file)))):
                fault = row_fault(problems, side)
                return fail_job(self.store, job["id"], fault.code, fault.message, param=fault.param, lines=fault.lines)
        code, param = _ERRORS.get(error["code"], ("run_failed", None))
        return fail_job(self.store, job["id"], code, str(error["message"]), param=param)

    def _serve_snapshots(self, job_id: str, run: Run) -> None:
        """Serve each snapshot once, on its base: all of ends of epochs, and the newest of stops, whose earlier
        ones are removed. Raises RequestError while there is no engine.
        """
        job = self._job(job_id)
        if job["status"] == "cancelled" or not run.events_path.exists():
            return
        run_events = list(run.events())
        metrics, snapshots = metrics_by_step(run_events), _snapshots(job, run_events)
        stops = [name for name, snapshot in snapshots.items() if snapshot.values.get("at") == "stop"]
        for name, snapshot in snapshots.items():
            if name in stops[:-1] or self.store.one(models, name=name) is not None:
                continue
            step = snapshot.step
            try:
                self.engines.attach(job["base"], name, run.path / snapshot.values["path"])
            except Exception as error:
                if _is_unavailable(error):
                    raise
                message = f"{name}: cannot be served: {without_paths(self.store, error)}"
                self.store.add_events([event(job_id, message, level="warn", once=f"refused {step}")])
                continue
            owner = {"job": job_id, "base": job["base"], "project": job["project"]}
            model = {"name": name, **owner, "step": step, "metrics": metrics[step]}
            message = f"Checkpoint created at step {step} with Snapshot ID: {name}"
            self.store.add_model(model, [event(job_id, message, once=f"snapshot {step}")])
        if not stops or self.store.one(models, name=stops[-1]) is None:
            return  # the newest cannot be served: the one before it stays
        for name in stops[:-1]:
            model_row = self.store.one(models, name=name)
            if model_row is None:  # it was never served
                remove(run.path / snapshots[name].values["path"])
            elif model_row["deleted_at"] is None:
                self.engines.detach(name)
                self.store.delete_model(name)
                self.store.remove_unused_weights()

    def _write_results(self, job_id: str, run_events: Iterable[Event]) -> Record:
        """Write the content of the results file, and return its row for the table of files."""
        file_id, content = derived_id("file-", job_id, "results"), results_file(run_events)
        if self.bases.results_encoding == "base64":
            content = base64.b64encode(content)
        path = self.store.content_path(file_id)
        write_atomic(path, content)
        facts = {"purpose": "fine-tune-results", "filename": "step_metrics.csv", "bytes": len(content)}
        return {"id": file_id, **facts, "sha256": sha256_file(path)}

    def _tidy(self, job_id: str) -> None:
        """Remove what only another step would need, if a job has succeeded or was cancelled. For a cancelled
        job the results file of its steps is written first, and the snapshot of its stop is removed."""
        job, run = self.store.job(job_id), Run(self._run_path(job_id))
        if job is None or job["status"] not in ("succeeded", "cancelled"):
            return
        try:
            # The result and the report stay. Space is freed first, since the disk may be full.
            for path in (run.rows_path, *run.checkpoints_path.glob("*")):
                remove(path)
            if job["status"] == "cancelled" and run.events_path.exists():
                self._write_cancelled(job, run)
            remove(run.checkpoints_path)
            remove(run.path / "lock.json")  # a killed run leaves it
        except (OSError, RunError, StorageError) as error:
            failure = "the results of its steps are not kept"
            if job["status"] == "succeeded":
                failure = "what it no longer needs cannot be removed"
            self.on_note(f"{job_id}: {failure}: {error}")

    def _write_cancelled(self, job: Record, run: Run) -> None:
        """Write the results file of a cancelled job, and remove the snapshot of its stop."""
        job_id, run_events = job["id"], list(run.events())
        if any(run_event.kind == "step" for run_event in run_events):
            file_row = self._write_results(job_id, run_events)
            self.store.insert(files, {**file_row, "project": job["project"]})
            self.store.update(jobs, {"result_file": file_row["id"]}, id=job_id)
        for name, snapshot in _snapshots(job, run_events).items():
            if self.store.one(models, name=name) is None:
                remove(run.path / snapshot.values["path"])

    def _finish(self, job_id: str, run: Run, export_error: Record | None = None) -> None:
        """Serve the model on its base, write the results file, and only then let the job succeed: a client that
        reads `succeeded` can use the model at once."""
        job = self._job(job_id)
        name = job["tuned_name"]
        try:
            self._serve_snapshots(job_id, run)
            self.engines.attach(job["base"], name, run.path)
        except Exception as error:
            self.crashes[job_id] += getattr(error, "code", "") == CRASHED
            if _is_unavailable(error) and self.crashes[job_id] < MOST_ATTEMPTS:
                self.unfinished[job_id] = export_error
                return None
            return fail_job(self.store, job_id, "result_not_served", f"The result cannot be served: {error}")
        run_events = list(run.events())
        self.store.add_events(EventTranslator(job_id)(run_events))
        file_row = self._write_results(job_id, run_events)
        step, metrics = max(metrics_by_step(run_events).items())
        model = {"name": name, "job": job_id, "base": job["base"], "step": step, "metrics": metrics}
        export_message = "" if export_error is None else export_error.get("message", "")
        messages = [
            event(job_id, f"Checkpoint created at step {step} with Snapshot ID: {name}", once="snapshot"),
            event(job_id, f"New fine-tuned model created: {name}", once="model"),
            *missing_exports(job_id, run, without_paths(self.store, export_message)),
            event(job_id, "The job has successfully completed", once="completed"),
        ]
        num_tokens = trained_tokens(run_events)
        if not self.store.succeed(job_id, messages, model=model, result=file_row, trained_tokens=num_tokens):
            return self.engines.detach(name)  # the job was paused or cancelled at the last moment
        self.store.remove_unused()
        self.store.remove_unused_weights()
        return None


def _snapshots(job: Record, run_events: Iterable[Event]) -> dict[str, Event]:
    """Events of snapshots, results before a run's last step, by names of their served models, oldest first."""
    model, project, suffix = job["model"], job["project"], job["request"]["suffix"]
    return {
        snapshot_name(model, project, suffix, job["id"], run_event.step): run_event
        for run_event in run_events
        if run_event.kind == "snapshot"
    }


def _is_unavailable(error: Exception) -> bool:
    """Whether an engine refused because it is being started, or ended during the request."""
    return isinstance(error, RequestError) and (error.status == UNAVAILABLE or error.code == CRASHED)
