"""What a sweep and a run want of Ray, against a Ray that is played."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.errors import DataError, GroupError, InputError
from tunesmith.parallel import cluster
from tunesmith.parallel.cluster import connected, needs_of
from tunesmith.recipe.load import validate
from tunesmith.sweeps import ray_engine
from tunesmith.sweeps.ray_engine import RayTasks
from tunesmith.sweeps.trial import Job


class Lost(Exception):
    pass


class FakeRay:
    """Ray with so many processors and cards, whose tasks end when they are waited for."""

    exceptions = SimpleNamespace(RayError=Lost)

    def __init__(self, results: tuple[Any, ...] = (), **resources: float) -> None:
        self.resources, self.results, self.options = resources, list(results), dict[str, Any]()

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, **options: Any) -> Any:
        self.options = options
        return lambda function: SimpleNamespace(remote=lambda job: job.name)

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return (tasks, []) if self.results else ([], tasks)

    def get(self, task: Any) -> Any:
        result = self.results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result


@pytest.mark.parametrize(
    ("options", "resources", "needs", "slots"),
    [
        ({}, {"CPU": 8}, (1, 0), 8),
        ({"threads": 3}, {"CPU": 8}, (3, 0), 2),
        ({"threads": 2, "devices": 2, "device": "cpu"}, {"CPU": 8, "GPU": 4}, (4, 0), 2),
        ({}, {"CPU": 64, "GPU": 4}, (1, 1), 4),
        ({"devices": 2, "threads": 8}, {"CPU": 64, "GPU": 4}, (8, 2), 2),
    ],
)
def test_trials_at_once_are_those_that_there_is_room_for(
    options: dict[str, Any], resources: dict[str, float], needs: tuple[float, float], slots: int
) -> None:
    ray, recipe = FakeRay(**resources), validate({"model": "m", **options})
    assert tuple(needs_of(recipe, ray).values()) == needs
    assert RayTasks(ray, needs_of(recipe, ray)).slots == slots
    assert ray.options == {"max_retries": 0, "num_cpus": needs[0], "num_gpus": needs[1]}


def test_a_trial_that_no_machine_can_hold_is_refused() -> None:
    ray, recipe = FakeRay(CPU=8), validate({"model": "m", "threads": 16})
    with pytest.raises(InputError, match="a trial needs 16 cpus, but this Ray has 8 cpus and 0 gpus"):
        RayTasks(ray, needs_of(recipe, ray))


def test_a_lost_worker_is_the_failure_of_its_trial(tmp_path: Path) -> None:
    ray = FakeRay(("", Lost("node  died")), CPU=2)
    tasks = RayTasks(ray, needs_of(validate({"model": "m"}), ray))
    for name in ("a", "b"):
        tasks.start(Job(name, tmp_path / name, tmp_path, tmp_path))
    assert tasks.ended() == {"a": "", "b": "Ray lost it: node died"}
    assert tasks.ended() == {}


def test_without_ray_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match="leave --ray out"), connected("local"):
        pass


def test_an_address_where_nobody_answers_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself tries for more than five minutes."""
    ray = SimpleNamespace(init=lambda **how: pytest.fail("it would wait"))
    monkeypatch.setattr(cluster, "import_ray", lambda: ray)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(InputError, match=f"--ray {address}: no Ray is reached there"), connected(address):
            pass


def test_an_address_without_a_port_is_refused_by_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "import_ray", SimpleNamespace)
    with pytest.raises(InputError, match=r"ray://head: has no port\. Write HOST:PORT"), connected("ray://head"):
        pass


def test_the_error_of_a_worker_is_that_of_the_rank_which_failed() -> None:
    mark = ray_engine._MARK
    lost = f'{mark}{{"kind":"error","code":"GroupError","message":"rank 1: bad row","exit":2}}'
    own = f'{mark}{{"kind":"error","code":"DataError","message":"bad row","exit":2}}'
    found = ray_engine._cause(RuntimeError(f"rank 0:\nRuntimeError: {lost}\nrank 1:\nRuntimeError: {own}\n"))
    assert isinstance(found, DataError)
    assert str(found) == "bad row"
    assert isinstance(ray_engine._cause(RuntimeError("worker died")), GroupError)
