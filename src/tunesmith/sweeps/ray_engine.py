"""Trials on Ray, several at once, and a run in a group of its workers: on this machine, or on a cluster whose
machines share the disk of the runs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from tunesmith.environment.packages import install_command
from tunesmith.errors import GroupError, InputError, Stopped, TunesmithError, one_line
from tunesmith.parallel.child import Hears, as_error
from tunesmith.parallel.cluster import connected, needs_of
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.background import in_background
from tunesmith.runs.events import follow
from tunesmith.runs.folder import Run
from tunesmith.sweeps.trial import Job, run_trial


class RayTasks:
    """An engine whose trials are Ray tasks."""

    def __init__(self, ray: Any, needs: Mapping[str, float]) -> None:
        """`needs`: of a trial, see `needs_of`. Raises InputError where no machine can hold one."""
        self._ray = ray
        resources = ray.cluster_resources()
        room = {"num_cpus": resources.get("CPU", 0), "num_gpus": resources.get("GPU", 0)}
        self.slots = int(min(room[key] // needed for key, needed in needs.items() if needed))
        if self.slots < 1:
            names = {key.removeprefix("num_"): needed for key, needed in needs.items() if needed}
            words = ", ".join(f"{needed:g} {name}" for name, needed in names.items())
            raise InputError(
                f"--ray: a trial needs {words}, but this Ray has {room['num_cpus']:g} cpus and "
                f"{room['num_gpus']:g} gpus. Lower threads or devices in base, or use a larger cluster."
            )
        self._remote = ray.remote(max_retries=0, **needs)(run_trial)
        self._tasks: dict[str, Any] = {}

    def start(self, job: Job) -> None:
        self._tasks[job.name] = self._remote.remote(job)

    def ended(self) -> dict[str, str]:
        over = {}
        for name, task in list(self._tasks.items()):
            if self._ray.wait([task], timeout=0)[0]:
                del self._tasks[name]
                try:
                    over[name] = str(self._ray.get(task))
                except self._ray.exceptions.RayError as error:  # its worker or its machine is gone
                    over[name] = f"Ray lost it: {one_line(error)}"
        return over


ATTEMPTS = 4
"""Times that a group which loses a worker is started; its run continues from the newest checkpoint."""
_MARK = "tunesmith error: "


def train_on_ray(
    recipe: Recipe, *, out: Path, workers: int, listener: Hears, address: str = "auto", offline: bool = False
) -> Run:
    """Train on several workers, each with a device of its own; returns the finished run in `out`.

    All machines see the same files under the same paths. A group that loses a worker is started again.

    Raises:
        InputError: Ray is missing or not reached, or what `train` refuses.
        Stopped: stopped on request; the same call continues.
        TunesmithError: what the run failed with.
    """
    with connected(address) as ray:
        needs, run = needs_of(recipe.model_copy(update={"devices": 1}), ray), Run(out)
        place = {"recipe": recipe.model_dump_json(), "out": str(out.absolute()), "folder": str(Path.cwd())}
        trainer = _trainer({**place, "offline": offline}, needs, workers)
        for attempt in range(1, ATTEMPTS + 1):
            call = in_background(trainer.fit)

            def is_over(call: Future[Any] = call) -> bool:
                if listener.should_stop() and run.is_locked() and not run.stop_asked():
                    run.ask_stop()
                return call.done()

            for event in follow(run.events_path, is_over):
                listener.on_event(event)
            try:
                call.result()
                break
            except Exception as failure:  # Ray's wrapper around what a worker raised
                error = _cause(failure)
                if attempt == ATTEMPTS or not isinstance(error, GroupError) or listener.should_stop():
                    raise error from failure
    if run.state() == "stopped":
        raise Stopped("stopped; the same command continues it")
    return run


def _trainer(config: dict[str, Any], needs: dict[str, float], workers: int) -> Any:
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as error:
        raise InputError(f"--ray: Ray Train is not whole ({error}). Install it: {install_command('ray')}.") from error
    on_cards = needs["num_gpus"] > 0
    return TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if on_cards else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=on_cards, resources_per_worker={"CPU": needs["num_cpus"]}
        ),
        run_config=RunConfig(storage_path=str(Path(gettempdir()) / "tunesmith-ray")),
    )


def _worker(config: dict[str, Any]) -> None:
    """A rank: it trains inside the group that Ray made."""
    from tunesmith.api import train

    os.chdir(config["folder"])
    recipe = Recipe.model_validate_json(config["recipe"])
    try:
        train(recipe=recipe, out=config["out"], offline=config["offline"], progress=False)
    except Stopped:
        return
    except TunesmithError as error:
        values = {"kind": "error", "code": type(error).__name__, "message": str(error), "exit": error.exit_code}
        raise RuntimeError(_MARK + json.dumps(values)) from None


def _cause(failure: BaseException) -> TunesmithError:
    """The error that a worker named, the one of the rank that failed first; GroupError if one is gone."""
    errors = [json.loads(line) for line in re.findall(rf"{_MARK}(\{{.*\}})", str(failure))]
    if not errors:
        return GroupError(f"Ray: {' '.join(str(failure).split()):.500}")
    first = min(errors, key=lambda one: one["code"] == GroupError.__name__)
    return as_error(first, first["message"], first["exit"])
