"""Runs of jobs as Ray tasks: with a stand-in for Ray, and on a local Ray."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.places import FakeModels, put_file
from jobs.test_end_to_end import HOW
from tiny_run import chats, model_folder
from tunesmith.jobs import ray_launcher
from tunesmith.jobs.bases import Bases, PublicBase
from tunesmith.jobs.dispatcher import Dispatcher
from tunesmith.jobs.job_request import JobBody
from tunesmith.jobs.launcher import LocalLauncher
from tunesmith.jobs.ray_launcher import RayLauncher, hold_place
from tunesmith.jobs.routes import create_job
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events


class FakeRay:
    """Tasks that wait until the test lets them end."""

    class exceptions:
        RayError = RuntimeError

    def __init__(self, **resources: float) -> None:
        self._resources = resources
        self.options: dict[str, Any] = {}
        self.ended: set[int] = set()
        self.cancelled: list[int] = []
        self.num_tasks = 0

    def cluster_resources(self) -> dict[str, float]:
        return self._resources

    def remote(self, *given: Any, **options: Any) -> Any:
        """As Ray's: once to make the task, once to start it."""
        if options:
            self.options = options
            return lambda function: self
        self.num_tasks += 1
        return self.num_tasks

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [one for one in tasks if one in self.ended], []

    def cancel(self, task: int) -> None:
        self.cancelled.append(task)


RECIPE = b'{"model": "m", "task": "chat", "data": {"train": ["a.jsonl"]}, "threads": 2}'


@pytest.mark.parametrize(("resources", "slots"), [({"CPU": 4}, 4), ({"CPU": 64, "GPU": 2}, 2), ({}, 1)])
def test_a_place_is_a_card_or_a_processor(resources: dict[str, float], slots: int) -> None:
    assert RayLauncher(FakeRay(**resources), offline=True).slots == slots


def test_a_run_waits_for_its_place_and_can_be_stopped_there(tmp_path: Path) -> None:
    recipe, ray = tmp_path / "r.yaml", FakeRay(CPU=4)
    recipe.write_bytes(RECIPE)
    run = RayLauncher(ray, offline=True).start(tmp_path / "ftjob-a", recipe, {"A": "b"})
    assert ray.options == {"max_retries": 0, "num_cpus": 2, "num_gpus": 0}
    assert run.is_alive()
    run.stop()
    assert ray.cancelled == [1]
    ray.ended.add(1)
    assert not run.is_alive()
    assert run.error() is None
    assert RayLauncher(ray, offline=True).find(tmp_path / "ftjob-a") is None


def test_a_child_that_a_lost_task_left_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr(ray_launcher, "POLL_S", 0.01)
    run, looked = tmp_path / "ftjob-a", []
    lock = os.open(tmp_path / ".ftjob-a.lock", os.O_CREAT | os.O_RDWR)
    os.write(lock, b"1")
    fcntl.flock(lock, fcntl.LOCK_EX)
    found = RayLauncher(FakeRay(), offline=True).find(run)
    assert found is not None
    assert found.is_alive()

    def start(self: LocalLauncher, *given: Any) -> Any:
        raise AssertionError("a second process would work on the run")

    monkeypatch.setattr(LocalLauncher, "start", start)
    monkeypatch.setattr(ray_launcher.time, "sleep", lambda s: looked.append(os.close(lock)))
    hold_place(run, tmp_path / "r.yaml", {}, True, "server")
    assert len(looked) == 1
    assert not found.is_alive()


def test_a_card_is_shared_with_the_server_on_its_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    class Done:
        def is_alive(self) -> bool:
            return False

    def start(self: LocalLauncher, run: Path, recipe: Path, environment: dict[str, str]) -> Done:
        started.append(environment)
        return Done()

    monkeypatch.setattr(LocalLauncher, "start", start)
    for server in (ray_launcher.socket.gethostname(), "another"):
        hold_place(tmp_path / "ftjob-a", tmp_path / "r.yaml", {"A": "b"}, True, server)
    assert started == [{"A": "b"}, {"A": "b", "TUNESMITH_CARD_SHARE": "1"}]


@pytest.mark.slow
def test_a_local_ray_of_two_processors_carries_ten_jobs_with_one_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    import ray

    from tunesmith.parallel.cluster import NO_REPORTS

    os.environ.update(NO_REPORTS)
    model_folder(tmp_path / "tiny")
    bases = Bases(bases={"tiny": PublicBase(model=str(tmp_path / "tiny"))})
    chats(tmp_path / "train.jsonl", 18, seed=1)
    store, models = Store(tmp_path / "store"), FakeModels()
    file = put_file(store, (tmp_path / "train.jsonl").read_bytes())
    body = JobBody(model="tiny", training_file=file, seed=7, hyperparameters={**HOW, "n_epochs": 4})
    names = [create_job(store, bases, body)["id"] for _ in range(10)]
    source = str(Path(__file__).parents[2] / "src")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": source}})
    try:
        launcher = RayLauncher(ray, offline=True)
        working = Dispatcher(store, bases, launcher, models, parallel=launcher.slots)
        most, killed, since = 0, "", time.monotonic()
        while any(store.job(name)["finished_at"] is None for name in names):
            assert time.monotonic() - since < 400
            working.round()
            most = max(most, len(working.active))
            log = store.runs_path / names[3] / "events.jsonl"
            if not killed and log.exists() and b'"kind":"step"' in log.read_bytes():
                killed = (store.runs_path / f".{names[3]}.lock").read_text()
                os.kill(int(killed), signal.SIGKILL)
            time.sleep(0.1)
    finally:
        ray.shutdown()
    assert killed
    assert most == 2
    assert {store.job(name)["status"] for name in names} == {"succeeded"}
    bytes_of = {(store.runs_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in names}
    assert len(bytes_of) == 1, "one of them differs"
    said = [row["message"] for row in store.page(events, events.c.job == names[3], limit=200)[0]]
    assert any("will be started again" in one for one in said)
    steps = [one for one in said if one.startswith("Step ")]
    assert len(steps) == len(set(steps))
    store.close()
