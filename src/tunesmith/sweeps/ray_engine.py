"""Trials on Ray, several at once, and a run in a group of its workers: on this machine, or on a cluster whose machines
share the disk of the runs."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from tunesmith.environment import for_child, install_command
from tunesmith.errors import GroupError, InputError, Stopped, TunesmithError
from tunesmith.parallel.child import Hears, as_error
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.background import BackgroundCall
from tunesmith.runs.folder import Run
from tunesmith.sweeps.trial import Job, run_trial

NO_REPORTS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
LOCAL = "local"
"""Address of a Ray that is started on this machine and ends with this process."""


def import_ray() -> Any:
    """Ray, with its report of usage switched off. Raises InputError with the command that installs it."""
    os.environ.update(NO_REPORTS)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise InputError(
            f"--ray: Ray is not installed. Install it with: {install_command('ray')}, or leave --ray out: trials then "
            "run one after the other."
        ) from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray at `address`: "local", "auto" (the cluster that this machine belongs to), HOST:PORT or ray://HOST:PORT.

    Raises InputError if it is not reached.
    """
    ray = import_ray()
    paths = for_child()["PYTHONPATH"]
    environment = {"env_vars": {**NO_REPORTS, "PYTHONPATH": paths}}
    try:
        ray.init(
            address=address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=environment,
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"--ray {address}: no Ray is reached there: {text:.200} Use local, or start one.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def needs_of(recipe: Recipe, ray: Any) -> dict[str, float]:
    """Processors and cards that Ray keeps for one run of a recipe.

    As many processors as `threads` says, else one; a card each of `devices` if the cluster has cards and the recipe
    does not name another device.
    """
    devices = recipe.devices if isinstance(recipe.devices, int) else 1
    has_cards = ray.cluster_resources().get("GPU", 0) > 0 and recipe.device in ("auto", "cuda")
    threads = recipe.threads if isinstance(recipe.threads, int) else 1
    return {"num_cpus": threads * (1 if has_cards else devices), "num_gpus": devices if has_cards else 0}


class RayTasks:
    """An engine whose trials are Ray tasks."""

    def __init__(self, ray: Any, recipe: Recipe) -> None:
        self._ray, needs = ray, needs_of(recipe, ray)
        there = ray.cluster_resources()
        room = {"num_cpus": there.get("CPU", 0), "num_gpus": there.get("GPU", 0)}
        self.slots = int(min(room[key] // needed for key, needed in needs.items() if needed))
        if self.slots < 1:
            words = ", ".join(f"{needed:g} {key.removeprefix('num_')}" for key, needed in needs.items() if needed)
            raise InputError(
                f"--ray: a trial needs {words}, but this Ray has {room['num_cpus']:g} cpus and {room['num_gpus']:g} "
                "gpus. Lower threads or devices in base, or use a larger cluster."
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
                over[name] = self._result(task)
        return over

    def _result(self, task: Any) -> str:
        try:
            return str(self._ray.get(task))
        except self._ray.exceptions.RayError as error:  # its worker or its machine is gone
            return f"Ray lost it: {' '.join(str(error).split()):.300}"


ATTEMPTS = 4
"""Times that a group which loses a worker is started; its run goes on from the newest checkpoint."""
_MARK = "tunesmith error: "


def train_on_ray(
    recipe: Recipe, *, out: Path, workers: int, listener: Hears, address: str = "auto", offline: bool = False
) -> Run:
    """Train on so many workers, each with a device of its own; the finished run in `out`.

    All machines see the same files under the same paths. A group that loses a worker is started again.

    Raises:
        InputError: Ray is missing or not reached, or what `train` refuses.
        Stopped: stopped on request; the same call goes on.
        TunesmithError: what the run failed with.
    """
    with connected(address) as ray:
        needs, run = needs_of(recipe.model_copy(update={"devices": 1}), ray), Run(out)
        place = {"recipe": recipe.model_dump_json(), "out": str(out.absolute()), "folder": str(Path.cwd())}
        trainer = _trainer({**place, "offline": offline}, needs, workers)
        for attempt in range(1, ATTEMPTS + 1):
            call = BackgroundCall(trainer.fit)

            def is_over(call: BackgroundCall[Any] = call) -> bool:
                if listener.should_stop() and run.is_locked() and not run.stop_asked():
                    run.ask_stop()
                return call.is_over()

            for event in run.follow(is_over):
                listener.on_event(event)
            try:
                call.result()
                break
            except Exception as failure:  # Ray's wrapper around what a worker raised
                error = _cause(failure)
                if attempt == ATTEMPTS or not isinstance(error, GroupError) or listener.should_stop():
                    raise error from failure
    if run.state() == "stopped":
        raise Stopped("stopped; the same command goes on")
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
    import tunesmith

    os.chdir(config["folder"])
    recipe = Recipe.model_validate_json(config["recipe"])
    try:
        tunesmith.train(recipe=recipe, out=config["out"], offline=config["offline"], progress=False)
    except Stopped:
        return
    except TunesmithError as error:
        values = {"kind": "error", "code": type(error).__name__, "message": str(error), "exit": error.exit_code}
        raise RuntimeError(_MARK + json.dumps(values)) from None


def _cause(failure: BaseException) -> TunesmithError:
    """The error that a worker named, the one of the rank that failed first; GroupError where a worker is gone."""
    found = [json.loads(line) for line in re.findall(rf"{_MARK}(\{{.*\}})", str(failure))]
    if not found:
        return GroupError(f"Ray: {' '.join(str(failure).split()):.500}")
    first = min(found, key=lambda one: one["code"] == GroupError.__name__)
    return as_error(first, first["message"], first["exit"])
