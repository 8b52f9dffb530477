"""What each tracker's library is called with; small stand-ins take the place of the libraries, so that every run of the
tests checks it. test_libraries.py has the same with the real ones."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, call

import pytest

from trackers.logs import ending, new_run, opening, trained, with_results, write
from tunesmith.runs.folder import Run
from tunesmith.trackers.libraries import TRACKERS, Tracker
from tunesmith.trackers.run_reader import RunReader, StepMetrics, results_of

STEPS = 4


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = with_results(new_run(tmp_path, every=None))
    write(found, [*opening(STEPS), *trained(1, STEPS, STEPS, every=None), *ending(STEPS)])
    return found


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> MagicMock:
    """A stand-in for a package and whatever is imported from it."""
    module = MagicMock(spec=ModuleType(name), name=name)
    module.configure_mock(__path__=[])
    monkeypatch.setitem(sys.modules, name, module)
    return module


def opened_in(name: str, run: Run, reader: RunReader) -> Tracker:
    tracker = TRACKERS[name](offline=False)
    tracker.open(run, reader)
    return tracker


def install_wandb(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> MagicMock:
    """A stand-in for wandb, whose run has these facts."""
    wandb = install(monkeypatch, "wandb")
    for name in ("setup", "login", "Settings", "init"):
        setattr(wandb, name, MagicMock())
    wandb.setup.return_value.settings.mode = "offline"
    wandb.init.return_value.configure_mock(**facts)
    return wandb


def send(run: Run, name: str) -> list[StepMetrics]:
    reader = RunReader(run)
    steps = [step for event in run.events() for step in reader.add(event)]
    tracker = opened_in(name, run, reader)
    assert tracker.last_step == -1
    tracker.log(steps)
    tracker.describe(reader, results_of(run))
    tracker.close(reader.state)
    return steps


def test_wandb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    wandb = install_wandb(monkeypatch, offline=False, resumed=False, step=0)
    opened = wandb.init.return_value
    steps = send(run, "wandb")
    options = wandb.init.call_args.kwargs
    assert (options["project"], options["resume"], options["name"]) == ("tunesmith", "allow", run.path.name)
    assert options["config"]["optim"] == {"lr": 0.0003}
    assert options["config"]["data"]["chats.jsonl"] == "ab" * 32
    assert opened.log.call_args_list == [
        call({**step.values, "_timestamp": step.time}, step=step.step, commit=True) for step in steps
    ]
    assert {one.kwargs["type"] for one in opened.log_artifact.call_args_list} == {"model", "report"}
    assert opened.notes == "few rows\nkept: the last step"
    opened.finish.assert_called_once_with(exit_code=0)


def test_wandb_continues_after_the_step_that_its_server_has(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    install_wandb(monkeypatch, offline=False, resumed=True, step=3)
    assert opened_in("wandb", run, RunReader(run)).last_step == 2


@pytest.mark.parametrize(("is_synced", "last_step"), [(False, -1), (True, 7)])
def test_wandb_offline_is_written_anew_until_a_part_was_synced(
    is_synced: bool, last_step: int, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader = RunReader(run)
    names = (f"a-{reader.key}", f"b-{reader.key}", "c-of-another-run")
    folders = [tmp_path / "wandb" / f"offline-run-{name}" for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
    if is_synced:
        (folders[0] / f"run-{reader.key}.wandb.synced").touch()
    (run.path / "tracking").mkdir()
    run.write_json("tracking/wandb.json", {"step": 7})
    install_wandb(monkeypatch, offline=True, dir=str(folders[1] / "files"))
    opened = opened_in("wandb", run, reader)
    assert (opened.last_step, opened.place) == (last_step, str(folders[1]))
    assert [folder.is_dir() for folder in folders] == [is_synced, True, True]


def test_mlflow(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    mlflow, entities = install(monkeypatch, "mlflow"), install(monkeypatch, "mlflow.entities")
    mlflow.MlflowClient, mlflow.get_tracking_uri = MagicMock(), lambda: "sqlite:///mlflow.db"
    mlflow.set_experiment, mlflow.entities = MagicMock(), entities
    entities.Metric = entities.Param = entities.RunTag = lambda *values: values
    client = mlflow.MlflowClient.return_value
    client.search_runs.return_value, client.get_metric_history.return_value = [], []
    client.create_run.return_value.data.metrics, client.create_run.return_value.data.params = {}, {}
    steps = send(run, "mlflow")
    id_ = client.create_run.return_value.info.run_id
    batches = [one.kwargs for one in client.log_batch.call_args_list]
    sent = [metric for batch in batches for metric in batch.get("metrics", ())]
    values = [(key, v, int(step.time * 1000), step.step) for step in steps for key, v in step.values.items()]
    assert sorted(sent) == sorted(values)
    assert [key for key, *_, step in sent if step == 2][-1] == "train/loss"  # the mark of a step that is there whole
    assert ("optim.lr", "0.0003") in [param for batch in batches for param in batch.get("params", ())]
    assert ("versions.torch", "2.13.0") in [tag for batch in batches for tag in batch.get("tags", ())]
    client.log_artifacts.assert_called_once_with(id_, str(run.adapter_path), "adapter")
    client.set_terminated.assert_called_once_with(id_, "FINISHED")


def test_trackio(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    trackio, utils = install(monkeypatch, "trackio"), install(monkeypatch, "trackio.utils")
    trackio.init, trackio.Markdown, trackio.utils, utils.TRACKIO_DIR = MagicMock(), lambda text: text, utils, "here"
    opened = trackio.init.return_value
    opened._next_step = 0
    steps = send(run, "trackio")
    options = trackio.init.call_args.kwargs
    assert (options["resume"], options["embed"], options["auto_log_gpu"]) == ("allow", False, False)
    notes = call({"notes": "few rows\n\nkept: the last step"}, step=STEPS + 1)
    assert opened.log.call_args_list == [*(call(step.values, step=step.step) for step in steps), notes]
    assert {one.kwargs["type"] for one in opened.log_artifact.call_args_list} == {"model", "report"}
    opened.finish.assert_called_once_with()
