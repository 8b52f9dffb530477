"""Files of jobs that wait are checked, two at once, in processes that end when their job is not wanted.

As a run does, a check outlives a killed server, and the next one takes it over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from tunesmith.errors import InputError
from tunesmith.graders.strangers import GraderRefusedError, runnable
from tunesmith.jobs import reinforcement
from tunesmith.jobs.bases import Bases, PublicBase
from tunesmith.jobs.check_process import facts_of
from tunesmith.jobs.job_request import GRADER
from tunesmith.jobs.launcher import ChildProcess, start_child
from tunesmith.jobs.states import WAITING
from tunesmith.jobs.store import Store, event
from tunesmith.jobs.tables import models
from tunesmith.jobs.training_files import CheckedFile, FileFault, rounds
from tunesmith.recipe import load
from tunesmith.runs.atomic import write_atomic
from tunesmith.types import JsonObject, Record

CHECKS_AT_ONCE = 2
"""Checks, each of another project."""
MOST_ATTEMPTS = 3
"""Checks of a job that are ended from outside; starts of its run without a new checkpoint between them; crashes
of the engine while its result is attached."""
MEMORY_BYTES = 1 << 30
SECONDS, BYTES_A_SECOND = 60, 1 << 20
"""Processor time of a check: SECONDS, and one more for each BYTES_A_SECOND. Good rows take a tenth of it."""
ANSWER_BYTES = 1 << 18
"""Room on the disk for what a check says."""
SNAPSHOTS = 2
"""Ends of epochs before the last that become checkpoints; with the result, the last three epochs have one."""


def start_check(place: Path, request: Record) -> ChildProcess:
    """Start a check that is known by files next to `place`."""
    words, environment = [orjson.dumps(request).decode()], {"OMP_NUM_THREADS": "1"}
    return start_child(place, "tunesmith.jobs.check_process", words, environment, room=ANSWER_BYTES)


@dataclass
class FileChecks:
    """The checks under way, by their jobs."""

    store: Store
    bases: Bases
    start: Callable[[Path, Record], ChildProcess] = start_check
    active: dict[str, tuple[str, ChildProcess]] = field(default_factory=dict)
    """Project and process of each."""
    last_start: dict[str, float] = field(default_factory=dict)
    """The time of the last start of a project."""

    def recover(self) -> None:
        """Take over the checks of an earlier server, also of jobs that are not wanted any more."""
        for path in self.store.runs_path.glob(".ftjob-*.check.lock"):
            name = path.name.removeprefix(".").removesuffix(".check.lock")
            project = (self.store.job(name) or {"project": ""})["project"]
            self.active[name] = (project, ChildProcess(self._place(name)))

    def begin(self, waiting: Iterable[Record]) -> None:
        """Start what there is room for: jobs that are not checked, the projects in turn."""
        for job in sorted(waiting, key=lambda job: (self.last_start.get(job["project"], 0), job["seq"])):
            if len(self.active) >= CHECKS_AT_ONCE:
                break
            is_idle = all(project != job["project"] for project, _ in self.active.values())
            if is_idle and job["id"] not in self.active:
                self.active[job["id"]] = (job["project"], self.start(self._place(job["id"]), self._request(job)))
                self.last_start[job["project"]] = time.monotonic()

    def follow(self) -> bool:
        """End what is not wanted, and take over what has ended; whether anything has."""
        ended = []
        for name, (_, process) in list(self.active.items()):
            job = self.store.job(name)
            is_wanted = job is not None and job["status"] in WAITING and not job["is_checked"]
            if process.is_alive():
                if not is_wanted:
                    process.stop()
                continue
            if job is not None and is_wanted:
                self._take_over(job, process.printed())
            process.forget()
            ended.append(self.active.pop(name))
        return bool(ended)

    def close(self) -> None:
        """End all of them; the next server begins them again."""
        for _, process in self.active.values():
            process.stop()
        until = time.monotonic() + 2
        for _, process in self.active.values():
            while process.is_alive() and time.monotonic() < until:
                time.sleep(0.01)
            process.forget()

    def _place(self, name: str) -> Path:
        return self.store.runs_path / f"{name}.check"

    def _request(self, job: Record) -> JsonObject:
        request = job["request"]
        names = {which: request[f"{which}_file"] for which in ("training", "validation")}
        paths = {which: self.store.content_path(file) for which, file in names.items() if file is not None}
        num_bytes = sum(path.stat().st_size for path in paths.values() if path.exists())
        return {
            "files": {which: str(path) for which, path in paths.items()},
            "method": request.get("method", "supervised"), "min_examples": self.bases.min_examples,
            "grader": self._grader(request.get("grader")),
            "memory_bytes": MEMORY_BYTES, "seconds": SECONDS + num_bytes // BYTES_A_SECOND,
        }  # fmt: skip

    def _grader(self, sent: JsonObject | None) -> JsonObject | None:
        """A job's grader as its run reads it; None: it has none, or one that is no longer allowed."""
        with suppress(GraderRefusedError):
            return None if sent is None else runnable(sent, self.bases.graders, GRADER)
        return None

    def _take_over(self, job: Record, answer: Record | None) -> None:
        """The state that a job comes to by what its check said; None: it was ended from outside."""
        name = job["id"]
        if answer is None:
            attempts = job["attempts"] + 1
            self.store.change_job(name, if_status=WAITING, attempts=attempts)
            if attempts >= MOST_ATTEMPTS:
                message = (
                    f"The process that reads its files ended {attempts} times without an answer. Send shorter rows."
                )
                fail_job(self.store, name, "check_crashed", message)
            return
        try:
            recipe, numbers = self._recipe(job, facts_of(answer))
        except FileFault as fault:
            return fail_job(self.store, name, fault.code, fault.message, param=fault.param, lines=fault.lines)
        except InputError as error:  # of its base, which its numbers do not fit
            return fail_job(self.store, name, "run_failed", str(error))
        write_atomic(self.store.recipes_path / f"{name}.yaml", recipe)
        messages = [event(name, "Files validated, moving job to queued state", once="validated")]
        if "compute_multiplier" in numbers:
            sentences = reinforcement.sentences_on(numbers)
            messages += [event(name, text, once=f"numbers {i}") for i, text in enumerate(sentences)]
        values = {"status": "queued", "is_checked": True, "numbers": numbers, "attempts": 0}
        self.store.change_job(name, messages, if_status=WAITING, **values)

    def _recipe(self, job: Record, checked: CheckedFile) -> tuple[bytes, JsonObject]:
        """The recipe of a job as YAML, and its numbers so far. Raises FileFault, RecipeError."""
        request, base = job["request"], self.bases.bases.get(job["base"])
        if base is None:  # the file of bases was changed since
            raise FileFault("model_not_available", f"{job['base']} may no longer be tuned here.", "model")
        numbers = dict(request["hyperparameters"])
        if checked.method == "reinforcement":
            numbers = reinforcement.decided(numbers, num_rows=checked.num_rows, num_validation=checked.num_validation)
        elif numbers["n_epochs"] == "auto":
            numbers["n_epochs"] = rounds(checked.num_rows)
        decided = {**numbers, "seed": request["seed"]}
        if request.get("starts_from"):
            parent = self.store.one(models, name=request["starts_from"])
            assert parent is not None, "a model that an open job starts from is not deleted"
            base = base.model_copy(update={"model": str(self.store.model_path(parent))})
        validation = request["validation_file"] and self.store.content_path(request["validation_file"])
        grader = None if request.get("grader") is None else self._grader_file(job["id"], request["grader"])
        training = self.store.content_path(request["training_file"])
        recipe = job_recipe(base, checked, training, validation, decided, grader=grader)
        if request["integrations"]:
            recipe["track"] = ["wandb"]
        return orjson.dumps(recipe), numbers

    def _grader_file(self, name: str, sent: JsonObject) -> Path:
        """The file of a job's grader as its run reads it. Raises FileFault where it is allowed no longer."""
        try:
            grader = runnable(sent, self.bases.graders, GRADER)
        except GraderRefusedError as error:
            raise FileFault(error.code, str(error), error.place) from None
        path = self.store.recipes_path / f"{name}.grader.json"
        write_atomic(path, orjson.dumps(grader))
        return path


def fail_job(
    store: Store, name: str, code: str, message: str, *, param: str | None = None, lines: Iterable[str] = ()
) -> None:
    """Let a job end by an error, with an event for each of `lines`. Clients see no paths of this machine."""
    message = without_paths(store, message)
    messages = [event(name, line, level="error") for line in lines]
    text = message if message.startswith("The job failed") else f"The job failed: {message}"
    messages.append(event(name, text, level="error"))
    error = {"code": code, "message": message, "param": param}
    store.change_job(name, messages, if_status=[*WAITING, "running"], status="failed", error=error)


def without_paths(store: Store, message: object) -> str:
    """A message without the place of the store."""
    return str(message).replace(f"{store.folder}/", "")


def job_recipe(
    base: PublicBase,
    checked: CheckedFile,
    training: Path,
    validation: Path | None,
    numbers: Record,
    *,
    grader: Path | None = None,
) -> JsonObject:
    """The recipe of a job: options of its base, over which its request wins. Raises RecipeError."""
    times, beta = numbers["learning_rate_multiplier"], numbers.get("beta", "auto")
    drops = checked.method != "supervised"  # a cut prompt or comparison teaches something else
    is_here = Path(base.model).exists()  # the run may be resumed from another working directory
    from_request: JsonObject = {
        "model": str(Path(base.model).resolve()) if is_here else base.model,
        "task": checked.task,
        "data": {"train": [str(training)], "too_long": "drop" if drops else "cut"},
        "train": {"epochs": numbers["n_epochs"], "rows_per_step": numbers["batch_size"]},
        "seed": numbers["seed"],
        "devices": 1,
    }
    from_request["data"] |= {"held_out": 0.0} if validation is None else {"eval": [str(validation)]}
    if times != "auto":
        from_request["optim"] = {"lr_times": float(times)}
    if beta != "auto":
        from_request[checked.task] = {"beta": float(beta)}  # a task's own options are in the section of its name
    if grader is not None:
        from_request |= reinforcement.sections_of(numbers, grader)
    recipe: JsonObject = {"method": {"name": "lora"}, **base.recipe}
    recipe["checkpoint"] = {"snapshots": SNAPSHOTS, **recipe.get("checkpoint", {})}
    if validation is not None:
        recipe["evaluation"] = {"every": "epoch", "keep": "last", **recipe.get("evaluation", {})}
    for key, value in from_request.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    return load.validate(recipe).model_dump(mode="json", exclude_defaults=True) | {"method": recipe["method"]}
