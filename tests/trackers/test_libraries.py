"""Every tracker with its real library, without the network: values are those of events.jsonl to the last digit, after
three kills and resumes too, and each is there once. Skipped where a library is not installed."""

import json
import time
from pathlib import Path

import pytest

from trackers.logs import ending, event, new_run, opening, trained, with_results, write
from trackers.processes import answering, begun, finish, process_of
from trackers.stores import READ, in_mlflow, in_tensorboard, logged, missing, wandb_records
from tunesmith.errors import InputError
from tunesmith.runs.events import truncate_after
from tunesmith.runs.folder import Run
from tunesmith.trackers.libraries import TRACKERS
from tunesmith.trackers.sender import read_state

STEPS = 30
NAMES = [pytest.param(name, marks=pytest.mark.skipif(missing(name), reason="not installed")) for name in TRACKERS]


def wait_for(run: Run, name: str, step: int) -> None:
    until = time.monotonic() + 60
    while read_state(run, name).get("step", -1) < step:
        assert time.monotonic() < until, read_state(run, name)
        time.sleep(0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_is_there_with_all_its_digits(name: str, tmp_path: Path) -> None:
    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(STEPS), *trained(1, STEPS, STEPS), *ending(STEPS)])
    assert f" up to step {STEPS}, with the results: " in finish(name, run)
    assert READ[name](run) == logged(run, name)


@pytest.mark.skipif(missing("mlflow"), reason="not installed")
def test_a_run_that_is_done_in_one_database_is_sent_to_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(4), *trained(1, 4, 4), *ending(4)])
    for folder in ("a", "b", "a"):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
        assert f"with the results: sqlite:///{(tmp_path / folder / 'mlflow.db').as_posix()}" in finish("mlflow", run)
        assert in_mlflow(run) == logged(run, "mlflow")


@pytest.mark.skipif(missing("mlflow"), reason="not installed")
def test_what_is_no_mlflow_server_is_refused_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering() as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://u:secret@{address}")
        with pytest.raises(InputError, match=f"http://{address}: what answers is no MLflow server"), begun("mlflow"):
            pytest.fail("it can be used")


@pytest.mark.parametrize("name", NAMES)
def test_after_three_kills_and_resumes_every_value_is_there_once(name: str, tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    write(run, opening(STEPS))
    for number, (first, last) in enumerate([(1, 8), (7, 16), (15, 22)]):
        write(run, trained(first, last, STEPS))
        with begun(name, run):
            wait_for(run, name, last - 1)
            process_of(name).kill()
        if number == 1:
            (run.path / "tracking" / f"{name}.json").unlink()  # killed before it was written
        truncate_after(run.events_path, last - 4)
        write(run, [event("resume", last - 4, from_step=last - 4), *trained(last - 3, last - 2, STEPS)])
    write(run, trained(21, STEPS, STEPS))
    write(with_results(run), ending(STEPS))
    finish(name, run)
    assert READ[name](run) == logged(run, name)
    assert read_state(run, name)["done"]


@pytest.mark.skipif(missing("wandb"), reason="not installed")
def test_wandb_gets_recipe_versions_data_notes_and_the_last_values(tmp_path: Path) -> None:
    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(4), *trained(1, 4, 4), *ending(4)])
    finish("wandb", run)
    text = json.dumps(wandb_records(tmp_path))
    for part in ("0.0003", "2.13.0", "ab" * 32, "few rows", "result/eval/loss", "-adapter"):
        assert part in text


@pytest.mark.skipif(missing("mlflow"), reason="not installed")
def test_mlflow_gets_parameters_tags_and_artifacts(tmp_path: Path) -> None:
    import mlflow

    run = with_results(new_run(tmp_path / "runs"))
    write(run, [*opening(4), *trained(1, 4, 4), *ending(4)])
    finish("mlflow", run)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("tunesmith").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "0.0003"
    assert found.data.tags["data.chats.jsonl"] == "ab" * 32
    assert found.data.tags["data.hf___datasets_owner_name_a.parquet"] == "cd" * 32
    assert "few rows" in found.data.tags["mlflow.note.content"]
    paths = {one.path for one in client.list_artifacts(found.info.run_id)}
    assert paths == {"adapter", "report.html", "report.json", "report.md"}


@pytest.mark.skipif(missing("tensorboard"), reason="not installed")
def test_a_tensorboard_file_that_was_cut_short_is_continued(tmp_path: Path) -> None:
    run = new_run(tmp_path / "runs")
    write(run, [*opening(STEPS), *trained(1, 8, STEPS)])
    finish("tensorboard", run)
    (path,) = (run.path / "tensorboard").glob("events*")
    path.write_bytes(path.read_bytes()[:-20])  # the power went
    write(run, trained(9, STEPS, STEPS))
    write(with_results(run), ending(STEPS))
    finish("tensorboard", run)
    assert in_tensorboard(run) == logged(run, "tensorboard")


@pytest.mark.parametrize(
    ("name", "variables", "message"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "WANDB_API_KEY|WANDB_MODE=offline"),
        (
            "wandb",
            {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"},
            "answers.*WANDB_MODE=offline",
        ),
        ("wandb", {"WANDB_MODE": "disabled"}, "WANDB_MODE=disabled: nothing would be tracked. Unset it"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}, "127.0.0.1:9: no server answers.*sqlite:///"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "http://u:pw@127.0.0.1:9"}, "mlflow: http://127.0.0.1:9: no server answers"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "sqlite:////dev/null/x.db"}, "File exists: ./dev/null"),
        ("trackio", {"TRACKIO_SPACE_ID": "me/space"}, "there is no login for it. Set HF_TOKEN"),
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
    with pytest.raises(InputError, match=message), begun(name):
        pytest.fail("it can be used")


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
    match = r"--offline forbids it\. Drop one of the two\.$"
    with pytest.raises(InputError, match=match), begun(name, offline=True):
        pytest.fail("it can be used")
