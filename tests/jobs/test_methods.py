"""Jobs by DPO, jobs that tune a tuned model, checkpoints on the way, and metrics sent to Weights & Biases."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.places import SNAPSHOT, STEPS, FakeLauncher, FakeModels, dispatcher, pairs, put_file, put_job, rows
from jobs.test_dispatcher import work
from tunesmith.errors import InputError
from tunesmith.jobs import routes
from tunesmith.jobs.dispatcher import Dispatcher
from tunesmith.jobs.job_request import JobBody
from tunesmith.jobs.names import snapshot_name
from tunesmith.jobs.objects import checkpoint_object, job_object
from tunesmith.jobs.run_events import EventTranslator, results_file
from tunesmith.jobs.store import Store
from tunesmith.jobs.tables import events
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import RequestError
from tunesmith.types import Event

DPO = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 2}}}


@pytest.fixture
def opened() -> type[Store]:
    """SQLite alone."""
    return Store


def recipe_of(store: Store, name: str) -> dict[str, Any]:
    return json.loads((store.recipes_path / f"{name}.yaml").read_text())


def test_a_job_by_dpo_learns_from_preferences(store: Store) -> None:
    file, valid = put_file(store, pairs(12)), put_file(store, pairs(3), "file-b")
    name = put_job(store, file, method=DPO, validation_file=valid)
    work(store, FakeLauncher(), FakeModels())
    recipe, job = recipe_of(store, name), store.job(name)
    assert job["status"] == "succeeded"
    assert (recipe["task"], recipe["prefer"], recipe["data"]["too_long"]) == ("prefer", {"beta": 0.3}, "drop")
    assert recipe["evaluation"] == {"every": "epoch", "keep": "last"}
    shown = job_object(job)
    assert set(shown["hyperparameters"]) == {"n_epochs", "batch_size", "learning_rate_multiplier"}
    assert shown["method"] == {"type": "dpo", "dpo": {"hyperparameters": {**shown["hyperparameters"], "beta": 0.3}}}


def test_the_usual_beta_is_shown_once_it_is_chosen(store: Store) -> None:
    name = put_job(store, put_file(store, pairs(12)), method={"type": "dpo"}, hyperparameters={"batch_size": 4})
    assert store.job(name)["numbers"]["beta"] == "auto"
    work(store, FakeLauncher(), FakeModels())
    assert job_object(store.job(name))["method"]["dpo"]["hyperparameters"]["beta"] == 0.1


@pytest.mark.parametrize(
    ("content", "method", "words"),
    [
        (
            rows(12), "dpo", "Input file file-a is in the fine-tune-chat format, but the specified fine-tuning job is "
            "not using 'supervised' as the training method (provided method=dpo).",
        ),
        (
            pairs(12), "supervised", "Input file file-a is in the fine-tune-preference format, but the specified "
            "fine-tuning job is not using 'dpo' as the training method (provided method=supervised).",
        ),
        (
            pairs(11) + b'{"input": {"messages": [{"role": "user", "content": "q"}]}, "preferred_output": []}\n', "dpo",
            "Invalid file format. Line 12: ",
        ),
    ],
)  # fmt: skip
def test_rows_of_another_method_are_the_jobs_error(store: Store, content: bytes, method: str, words: str) -> None:
    name = put_job(store, put_file(store, content), method={"type": method})
    work(store, FakeLauncher(), FakeModels(), num=2)
    error = store.job(name)["error"]
    assert (error["code"], error["param"]) == ("invalid_training_file", "training_file")
    assert error["message"].startswith(f"The job failed due to an invalid training file. {words}")


def test_ends_of_epochs_are_checkpoints(store: Store) -> None:
    models = FakeModels()
    name = put_job(store, put_file(store, rows(12)), suffix="mine")
    working = dispatcher(store, FakeLauncher(), models)
    while not models.served:
        working.round()
    assert store.job(name)["status"] == "running"
    tuned = snapshot_name("tiny", "tunesmith", "mine", name, SNAPSHOT)
    assert tuned.endswith(":ckpt-step-4")
    assert models.served == {tuned: str(store.runs_path / name / "snapshots" / "step-4")}
    assert "snapshots" in recipe_of(store, name)["checkpoint"]
    work(store, working.launcher, models)
    [first, last] = [checkpoint_object(row) for row in store.tuned(job=name)]
    assert first["metrics"] == {"step": 4, "train_loss": 0.25}
    assert (last["step_number"], last["fine_tuned_model_checkpoint"]) == (STEPS, store.job(name)["tuned_name"])
    assert first["id"] != last["id"]


def test_a_pause_makes_a_checkpoint_that_can_be_asked(store: Store) -> None:
    models = FakeModels()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, FakeLauncher(), models)
    while not any(event.kind == "step" for event in Run(store.runs_path / name).events()):
        working.round()
    store.act(name, "pause", "Fine-tuning job paused")
    while working.active:
        working.round()
    [paused] = store.tuned(job=name)
    assert (paused["step"], paused["metrics"]) == (2, {"step": 2, "train_loss": 0.5})
    assert models.served == {paused["name"]: str(store.runs_path / name / "snapshots" / "step-2")}
    said = [row["message"].partition(" with ")[0] for row in store.page(events, newest_first=False, limit=100)[0]]
    place = said.index("Fine-tuning job paused: its run stops after the step under way")
    assert said[place + 1 :] == ["Step 2/6: training loss=0.50", "Checkpoint created at step 2"]
    store.act(name, "resume", "Fine-tuning job resumed")
    work(store, working.launcher, models)
    assert [row["step"] for row in store.tuned(job=name)] == [2, SNAPSHOT, STEPS]


def pause(store: Store, working: Dispatcher, name: str) -> None:
    """Let a job begin or go on, and pause it after its second or next step."""
    if store.job(name)["status"] == "paused":
        store.act(name, "resume", "Fine-tuning job resumed")
    working.round()
    if not store.tuned(job=name):
        working.round()
    store.act(name, "pause", "Fine-tuning job paused")
    while working.active:
        working.round()
    working.round()


def kept_steps(store: Store, name: str) -> list[str]:
    run = Run(store.runs_path / name)
    return sorted(path.parent.name for path in run.snapshots_path.glob("*/adapter"))


def test_of_the_results_at_stops_the_newest_is_kept(store: Store) -> None:
    models, launcher = FakeModels(), FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, models)
    pause(store, working, name)
    assert kept_steps(store, name) == ["step-2"]
    pause(store, working, name)
    [paused] = store.tuned(job=name)
    assert (paused["step"], kept_steps(store, name), list(models.served)) == (3, ["step-3"], [paused["name"]])
    store.act(name, "resume", "Fine-tuning job resumed")
    work(store, launcher, models)
    assert [row["step"] for row in store.tuned(job=name)] == [3, SNAPSHOT, STEPS]
    assert set(models.served) == {row["name"] for row in store.tuned()}


def test_the_result_of_an_earlier_stop_stays_if_the_newest_is_refused(store: Store) -> None:
    class Refusing(FakeModels):
        def attach(self, base: str, name: str, run: Path) -> None:
            if name.endswith("step-3"):
                raise ValueError("refused")
            super().attach(base, name, run)

    models, launcher = Refusing(), FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, models)
    pause(store, working, name)
    pause(store, working, name)
    assert [row["step"] for row in store.tuned(job=name)] == [2]
    assert [served.rpartition("-")[2] for served in models.served] == ["2"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_job_cancelled_while_waiting_keeps_results_and_no_checkpoints(store: Store, is_damaged: bool) -> None:
    notes, launcher, models = list[str](), FakeLauncher(), FakeModels()
    name, other = (put_job(store, put_file(store, rows(12), file)) for file in ("file-a", "file-b"))
    store.act(other, "pause", "Fine-tuning job paused")
    working = dispatcher(store, launcher, models)
    working.on_note = notes.append
    pause(store, working, name)
    store.act(other, "resume", "Fine-tuning job resumed")
    working.round()
    store.act(name, "resume", "Fine-tuning job resumed")
    working.round()
    run = Run(store.runs_path / name)
    (run.checkpoints_path / "step-1").mkdir(parents=True, exist_ok=True)
    if is_damaged:
        run.events_path.write_bytes(b"{damaged\n" + run.events_path.read_bytes())
    store.act(name, "cancel", "Fine-tuning job cancelled")
    for _ in range(14):
        working.round()
    assert not (run.checkpoints_path / "step-1").exists()
    assert run.checkpoints_path.exists() == is_damaged, "the next server tries again"
    assert (store.job(name)["result_file"] is None) == is_damaged == any(name in note for note in notes)
    assert store.job(other)["status"] == "succeeded"


def test_a_damaged_run_fails_its_job_and_no_other(store: Store) -> None:
    launcher = FakeLauncher()
    name, other = (put_job(store, put_file(store, rows(12), file)) for file in ("file-a", "file-b"))
    working = dispatcher(store, launcher, FakeModels())
    run = Run(store.runs_path / name)
    while not run.events_path.exists():
        working.round()
    run.events_path.write_bytes(b"{damaged\n" + run.events_path.read_bytes())
    working.active[name].process = SimpleNamespace(is_alive=lambda: False, stop=lambda: None)
    for _ in range(12):
        working.round()
    assert [store.job(one)["status"] for one in (name, other)] == ["failed", "succeeded"]
    assert store.job(name)["error"]["message"].startswith(f"runs/{name}/events.jsonl"), "a path of the server"


def test_a_disk_that_is_full_at_first_keeps_the_results_of_a_cancelled_job(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, FakeModels())
    pause(store, working, name)
    write, run = working._write_results, Run(store.runs_path / name)
    (run.checkpoints_path / "step-1").mkdir(parents=True)
    notes = list[str]()
    working.on_note = notes.append

    def write_results(*given: Any) -> Any:
        if any(run.checkpoints_path.glob("*")):
            raise OSError(28, "No space left on device")
        return write(*given)

    monkeypatch.setattr(working, "_write_results", write_results)
    store.act(name, "cancel", "Fine-tuning job cancelled")
    working.round()
    assert (store.job(name)["result_file"] is not None, notes) == (True, [])


def test_a_disk_that_stays_full_keeps_them_at_the_next_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, notes = FakeLauncher(), list[str]()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, FakeModels())
    working.on_note = notes.append
    pause(store, working, name)
    Run(store.runs_path / name).checkpoints_path.mkdir()

    def full(*given: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(working, "_write_results", full)
    store.act(name, "cancel", "Fine-tuning job cancelled")
    working.round()
    assert (store.job(name)["result_file"], len(notes)) == (None, 1)
    dispatcher(store, launcher, FakeModels()).recover()
    assert store.job(name)["result_file"] is not None


def test_a_stops_result_stays_until_a_job_that_tunes_it_has_ended(store: Store) -> None:
    models, launcher = FakeModels(), FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, models)
    pause(store, working, name)
    [paused] = store.tuned(job=name)
    further = put_job(store, "file-a", model=paused["name"])
    store.act(further, "pause", "Fine-tuning job paused")
    pause(store, working, name)
    assert [row["step"] for row in store.tuned(job=name)] == [3]
    assert kept_steps(store, name) == ["step-2", "step-3"]
    store.act(further, "cancel", "Fine-tuning job cancelled")
    work(store, launcher, models, num=1)
    assert kept_steps(store, name) == ["step-3"]


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_job_cancelled_in_its_pause_keeps_results_and_served_models(store: Store, is_restarted: bool) -> None:
    models, launcher = FakeModels(), FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, models)
    pause(store, working, name)
    run = Run(store.runs_path / name)
    for path in (run.checkpoints_path, run.rows_path):
        path.mkdir()
    store.act(name, "cancel", "Fine-tuning job cancelled")
    if is_restarted:
        working = dispatcher(store, launcher, models)
        working.recover()
    working.round()
    assert (kept_steps(store, name), len(models.served)) == (["step-2"], 1)
    assert store.file(store.job(name)["result_file"])["purpose"] == "fine-tune-results"
    assert {run.checkpoints_path, run.rows_path}.isdisjoint(run.path.iterdir()), "nothing goes on from them"


def test_a_tuned_model_is_tuned_further_and_kept_while_it_is_needed(store: Store) -> None:
    models = FakeModels()
    file = put_file(store, rows(12))
    work(store, launcher := FakeLauncher(), models, num=14 if put_job(store, file) else 0)
    parent = store.tuned()[-1]
    adapter = store.model_path(parent) / "adapter"
    adapter.mkdir()
    (adapter.parent / "merged").mkdir()
    name = put_job(store, file, model=parent["name"], suffix="again")
    job = store.job(name)
    assert (job["base"], job["model"]) == ("tiny", "tiny")
    assert job_object(job)["tunesmith"]["base"] == parent["name"]
    work(store, launcher, models)
    assert recipe_of(store, name)["model"] == str(store.model_path(parent))
    assert store.job(name)["status"] == "succeeded"
    assert not (adapter.parent / "merged").exists(), "it is made again where it is needed"
    store.delete_model(parent["name"])
    store.remove_unused_weights()
    assert adapter.exists(), "the model that was tuned from it needs it"
    for row in store.tuned(job=name):
        store.delete_model(row["name"])
    store.remove_unused_weights()
    assert not adapter.exists()
    with pytest.raises(RequestError, match="is not available for fine-tuning or does not exist"):
        put_job(store, file, model=parent["name"])


def test_metrics_of_the_validation_file_are_there_for_each_epoch() -> None:
    def measured(step: int, name: str, loss: float) -> Event:
        accuracy = {"value": loss / 10, "low": 0.0, "high": 1.0}
        return Event(
            "evaluation", step, 3.0, {"name": name, "loss": loss, "measures": {"token_accuracy": accuracy}}, {}
        )

    steps = [Event("step", i, 2.0, {"loss": 1.0 / i, "tokens": 1}, {}) for i in range(1, 5)]
    found = [measured(0, "before", 9.0), *steps[:2], measured(2, "step", 4.0), *steps[2:], measured(4, "after", 3.0)]
    translate = EventTranslator("ftjob-x")
    translate.total_steps = 4
    said = translate(found)
    texts = [row["message"] for row in said]
    assert texts[2] == "Step 2/4: training loss=0.50, validation loss=4.00, full validation loss=4.00"
    assert texts[5] == "All steps are done: the result is measured, saved and loaded next"
    assert len(texts) == 7
    assert said[2]["data"] == {
        "step": 2, "train_loss": 0.5, "total_steps": 4, "valid_loss": 4.0, "full_valid_loss": 4.0,
        "valid_mean_token_accuracy": 0.4, "full_valid_mean_token_accuracy": 0.4,
    }  # fmt: skip
    lines = results_file(found).decode().splitlines()
    assert lines[1:] == ["1,1.0,,,,,", "2,0.5,,4.0,0.4,4.0,0.4", f"3,{1 / 3},,,,,", "4,0.25,,3.0,0.3,3.0,0.3"]


WANDB = [{"type": "wandb", "wandb": {"project": "p", "name": "n", "tags": ["a", "b"]}}]


def test_metrics_go_to_weights_and_biases(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "check_names", lambda names: names)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, rows(12)), integrations=WANDB)
    work(store, launcher, FakeModels())
    assert recipe_of(store, name)["track"] == ["wandb"]
    assert launcher.started[0].environment == {"WANDB_PROJECT": "p", "WANDB_NAME": "n", "WANDB_TAGS": "a,b"}
    assert job_object(store.job(name))["integrations"] == WANDB
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(RequestError, match="set WANDB_API_KEY"):
        put_job(store, "file-a", integrations=WANDB)

    def not_installed(names: object) -> None:
        raise InputError(f"track: wandb: the package is missing. To install: {sys.executable} -m pip install wandb")

    monkeypatch.setattr(routes, "check_names", not_installed)
    with pytest.raises(RequestError, match=r"wandb: on the server: .* To install: python -m pip") as refused:
        put_job(store, "file-a", integrations=WANDB)
    assert sys.executable not in str(refused.value), "clients see no paths of this machine"


def test_a_cancelled_job_keeps_the_results_of_its_steps(store: Store) -> None:
    launcher = FakeLauncher()
    name = put_job(store, put_file(store, rows(12)))
    working = dispatcher(store, launcher, FakeModels())
    for _ in range(4):
        working.round()
    store.act(name, "cancel", "Fine-tuning job cancelled")
    for _ in range(3):
        working.round()
    job = store.job(name)
    assert (kept_steps(store, name), store.tuned(job=name)) == ([], []), "of the stop nothing is left"
    [file] = job_object(job)["result_files"]
    lines = base64.b64decode(store.content_path(file).read_bytes()).decode().splitlines()
    assert 1 < len(lines) < STEPS + 1
    assert (store.file(file)["purpose"], job["status"]) == ("fine-tune-results", "cancelled")


def test_the_measuring_before_and_after_the_steps_is_said() -> None:
    def samples(name: str) -> list[Event]:
        return [Event("sample", 0, 3.0, {"name": name, "index": i}, {}) for i in range(12)]

    after = [*samples("after"), Event("general", 4, 3.0, {"name": "after", "loss": 2.5}, {})]
    texts = [row["message"] for row in EventTranslator("ftjob-x")([*samples("before"), *after, *after])]
    assert texts[:2] == [f"Measuring the untouched model: sample prompts answered: {num}" for num in (1, 11)]
    assert texts[2:5] == [
        *(f"Measuring the result: sample prompts answered: {num}" for num in (1, 11)),
        "Measuring the result: loss on general text 2.50",
    ]
    ids = [row["id"] for row in EventTranslator("ftjob-x")([*after, *after])]
    assert ids[:3] == ids[3:], "a run that goes on measures again"


def test_no_variable_of_a_process_can_hold_a_nul() -> None:
    """Such a job could not be started, ever again, and no other after it."""
    for where in ({"project": "a\0"}, {"project": "p", "tags": ["a\0b"]}):
        with pytest.raises(ValidationError, match="should match pattern"):
            JobBody(model="tiny", training_file="file-a", integrations=[{"type": "wandb", "wandb": where}])
