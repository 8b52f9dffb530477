"""Every tracker with its real library, without the network: values are those of events.jsonl to the last digit, after
three kills and resumes too, and each is there once. Skipped where a library is not installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tracking.logs import ending, event, new_run, opening, trained, with_results, write
from tunesmith.errors import InputError
from tunesmith.runs.folder import Run
from tunesmith.tracking.processes import SenderProcess
from tunesmith.tracking.sender import read_state, state_path
from tunesmith.tracking.step_metrics import RunReader
from tunesmith.tracking.tracker import TRACKERS

Points = Counter[tuple[str, int, float]]

STEPS = 30


def missing(name: str) -> bool:
    return importlib.util.find_spec(TRACKERS[name].package) is None


NAMES = [pytest.param(name, marks=pytest.mark.skipif(missing(name), reason="not installed")) for name in TRACKERS]


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "HF_TOKEN", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def in_tensorboard(run: Run) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"tensors": 0})
    found.Reload()
    scalars = found.summary_metadata.items()
    tags = [tag for tag, metadata in scalars if metadata.plugin_data.plugin_name == "scalars"]
    return Counter((tag, one.step, make_ndarray(one.tensor_proto).item()) for tag in tags for one in found.Tensors(tag))


def wandb_records(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    texts = [subprocess.run([*words, str(file)], capture_output=True, text=True, check=True).stdout for file in files]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def in_wandb(run: Run) -> Points:
    rows = [record["history"]["item"] for record in wandb_records(Path.cwd()) if record["type"] == "history"]
    return Counter(
        (name, row["_step"], float(value)) for row in rows for name, value in row.items() if not name.startswith("_")
    )


def in_mlflow(run: Run) -> Points:
    import mlflow

    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    names = found.data.metrics
    return Counter(
        (name, one.step, one.value) for name in names for one in client.get_metric_history(found.info.run_id, name)
    )


def in_trackio(run: Run) -> Points:
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(run,) = S.get_runs('tunesmith')\nprint(json.dumps(S.get_logs('tunesmith', run)))"
    )  # a process of its own: the library reads its folder when it is imported
    text = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    rows = json.loads(text.splitlines()[-1])
    return Counter(
        (name, row["step"], float(value))
        for row in rows
        for name, value in row.items()
        if "/" in name and isinstance(value, (int, float))
    )


READ = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio}


def logged(run: Run) -> Points:
    reader = RunReader(run)
    steps = [step for one in run.events() for step in reader.add(one)]
    return Counter((name, step.step, float(value)) for step in steps for name, value in step.values.items())


def start(name: str, run: Run) -> SenderProcess:
    process = SenderProcess(name, offline=False)
    process.wait_ready()
    process.begin(run)
    return process


def wait_for(run: Run, name: str, step: int) -> None:
    until = time.monotonic() + 60
    while read_state(run, name).get("step", -1) < step:
        assert time.monotonic() < until, read_state(run, name)
        time.sleep(0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_is_there_with_all_its_digits(name: str, tmp_path: Path) -> None:
    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(STEPS), *trained(1, STEPS, STEPS), *ending(STEPS)])
    is_sent, line = start(name, run).finish(None)
    assert is_sent, line
    assert f"sent up to step {STEPS}, report and adapter, 2.9 KiB" in line
    assert READ[name](run) == logged(run)


@pytest.mark.parametrize("name", NAMES)
def test_after_three_kills_and_resumes_every_value_is_there_once(name: str, tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    write(run, opening(STEPS))
    for number, (first, last) in enumerate([(1, 8), (7, 16), (15, 22)]):
        write(run, trained(first, last, STEPS))
        process = start(name, run)
        wait_for(run, name, last - 1)
        process.kill()
        if number == 1:
            state_path(run, name).unlink()  # killed before it was written
        run.truncate_after(last - 4)
        write(run, [event("resume", last - 4, from_step=last - 4), *trained(last - 3, last - 2, STEPS)])
    write(run, trained(21, STEPS, STEPS))
    write(with_results(run), ending(STEPS))
    is_sent, line = start(name, run).finish(None)
    assert is_sent, line
    assert READ[name](run) == logged(run)
    assert read_state(run, name)["done"]


@pytest.mark.skipif(missing("wandb"), reason="not installed")
def test_wandb_gets_recipe_versions_data_notes_and_the_last_values(tmp_path: Path) -> None:
    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(4), *trained(1, 4, 4), *ending(4)])
    start("wandb", run).finish(None)
    text = json.dumps(wandb_records(tmp_path))
    for part in ("0.0003", "2.13.0", "ab" * 32, "few rows", "result/eval/loss", "-adapter"):
        assert part in text


@pytest.mark.skipif(missing("mlflow"), reason="not installed")
def test_mlflow_gets_parameters_tags_and_artifacts(tmp_path: Path) -> None:
    import mlflow

    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(4), *trained(1, 4, 4), *ending(4)])
    start("mlflow", run).finish(None)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "0.0003"
    assert found.data.tags["data.chats.jsonl"] == "ab" * 32
    assert "few rows" in found.data.tags["mlflow.note.content"]
    paths = {one.path for one in client.list_artifacts(found.info.run_id)}
    assert paths == {"adapter", "report.html", "report.json", "report.md"}


@pytest.mark.skipif(missing("tensorboard"), reason="not installed")
def test_a_tensorboard_file_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    write(run, [*opening(STEPS), *trained(1, 8, STEPS)])
    start("tensorboard", run).finish(None)
    (path,) = (run.path / "tensorboard").glob("events*")
    path.write_bytes(path.read_bytes()[:-20])  # the power went
    write(run, trained(9, STEPS, STEPS))
    write(with_results(run), ending(STEPS))
    start("tensorboard", run).finish(None)
    assert in_tensorboard(run) == logged(run)


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "WANDB_API_KEY"),
        ("wandb", {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"}, "127.0.0.1:9: no server answers"),
        ("wandb", {"WANDB_MODE": "disabled"}, "WANDB_MODE=disabled: nothing would be tracked"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "127.0.0.1:9: no server answers"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:////dev/null/x.db"}, "cannot be used"),
        ("trackio", {"TRACKIO_SPACE_ID": "me/space"}, "there is no login for it"),
        ("trackio", {"TRACKIO_SERVER_URL": "http://127.0.0.1:9"}, "127.0.0.1:9: no server answers"),
    ],
)
def test_a_tracker_that_cannot_be_used_says_so_before_anything_begins(
    name: str, variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing(name):
        pytest.skip("not installed")
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(InputError, match=message):
        SenderProcess(name, offline=False).wait_ready()


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [("mlflow", "MLFLOW_TRACKING_URI", "http://127.0.0.1:9"), ("trackio", "TRACKIO_SPACE_ID", "me/space")],
)
def test_offline_refuses_a_tracker_that_needs_the_network(
    name: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing(name):
        pytest.skip("not installed")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="--offline forbids it"):
        SenderProcess(name, offline=True).wait_ready()
