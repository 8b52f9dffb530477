"""A run that was stopped or killed anywhere ends exactly as one that never was."""

import json
import os
import shutil
from pathlib import Path

import pytest

from killed_runs import kill_runs
from often import often
from tiny_run import chats, same_run, stop_at, stopped, tiny_recipe
from tunesmith.errors import ModelError, RunError, Stopped
from tunesmith.inference.measure import load_training_rows
from tunesmith.recipe.schema import DataFile
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import Run, runs
from tunesmith.training import resolve as forecasting
from tunesmith.training import setup as preparing
from tunesmith.training.trainer import Listener, resume, train
from tunesmith.types import Event


@pytest.fixture(scope="module", params=often(["lora", "full"], "lora"))
def reference(request, tmp_path_factory) -> tuple[Path, Run]:
    """An uninterrupted run with dropout, two epochs, several micro-batches a step, evaluations and checkpoints."""
    folder = tmp_path_factory.mktemp(f"reference-{request.param}")
    method = {"name": "full"} if request.param == "full" else {"dropout": 0.1}
    recipe = tiny_recipe(folder, dropout=0.1, train={"tokens_per_pass": 96}, evaluation={"every": 3})
    recipe = recipe.model_copy(update={"method": tiny_method(method)})
    return folder, train(recipe, root=folder / "runs")


def tiny_method(method):
    from tunesmith.recipe.methods import FullMethod, LoraMethod

    return FullMethod() if method.get("name") == "full" else LoraMethod(rank=4, alpha=8, dropout=0.1)


def test_stopped_and_resumed_is_the_same_run(reference):  # trap: R1, R2, R3
    folder, straight = reference
    total = max(event.step for event in straight.events())
    assert total >= 8
    some = {1, 3, total - 1}  # before any checkpoint, behind one and an evaluation, and the last but one
    for step in some if straight.recipe().method.name == "lora" else {4}:
        run = stopped(straight.recipe(), folder / "stopped", step)
        assert run.state() == "stopped"
        same_run(resume(run), straight)
        shutil.rmtree(run.path)


def test_stopped_twice_and_resumed_is_the_same_run(reference):
    folder, straight = reference
    run = stopped(straight.recipe(), folder / "twice", 2)
    with pytest.raises(Stopped):
        resume(run, listener=stop_at(5))
    same_run(resume(run), straight)


@pytest.mark.slow
def test_resume_test_catches_random_numbers_that_start_over(reference, monkeypatch):  # trap: R2 planted
    folder, straight = reference
    run = stopped(straight.recipe(), folder / "planted", 3)
    monkeypatch.setattr("tunesmith.training.step._step_seed", lambda seed, step, rank: seed + step + 12345)
    resume(run)
    with pytest.raises(AssertionError):
        same_run(run, straight)


@pytest.mark.slow
def test_resume_test_catches_a_fresh_optimizer(reference, monkeypatch):  # trap: R3 planted
    folder, straight = reference
    run = stopped(straight.recipe(), folder / "planted-optimizer", 3)
    monkeypatch.setattr("tunesmith.optim.Optimizer.load", lambda self, tensors: None)
    resume(run)
    with pytest.raises(AssertionError):
        same_run(run, straight)


def test_the_saved_recipe_repeats_the_run(reference):
    folder, straight = reference
    same_run(train(straight.recipe(), root=folder / "again"), straight)


def stopped_run(tmp_path: Path) -> Run:
    return stopped(tiny_recipe(tmp_path), tmp_path / "runs", 2)


def changed_data(run: Run, folder: Path) -> None:
    chats(folder / "chats.jsonl", 18, seed=7)


def changed_settings(run: Run, folder: Path) -> None:
    text = run.recipe_path.read_text()
    run.recipe_path.write_text(text.replace("lr: 0.01", "lr: 0.02"))


def changed_template(run: Run, folder: Path) -> None:
    path = folder / "model-llama" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))


def changed_model(run: Run, folder: Path) -> None:
    from tiny_run import model_folder

    model_folder(folder / "model-llama", seed=5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_data, "chats.jsonl"),
        (changed_settings, "optim.lr was 0.01, is 0.02"),
        (changed_template, "template"),
        (changed_model, "model.safetensors"),
    ],
)
def test_what_changed_refuses_to_resume_and_is_named(tmp_path, change, named):  # trap: R4
    run = stopped_run(tmp_path)
    change(run, tmp_path)
    before = run.events_path.read_bytes()
    with pytest.raises(RunError, match="because this changed") as refusal:
        resume(run)
    assert named in str(refusal.value)
    assert run.events_path.read_bytes() == before


@pytest.mark.slow
def test_change_test_catches_a_resume_that_does_not_look(tmp_path, monkeypatch):  # trap: R4 planted
    run = stopped_run(tmp_path)
    changed_settings(run, tmp_path)
    monkeypatch.setattr("tunesmith.training.same_run._refuse_changes", lambda *args: None)
    with pytest.raises(pytest.fail.Exception), pytest.raises(RunError):
        resume(run)


def test_a_refused_resume_leaves_the_rows_of_the_run_alone(tmp_path):
    run = stopped_run(tmp_path)
    file = tmp_path / "chats.jsonl"
    before, rows = file.read_bytes(), sorted(path.name for path in (run.rows_path / "train").iterdir())
    for seed in range(7, 13):
        chats(file, 19, seed=seed)
        with pytest.raises(RunError, match="because this changed"):
            resume(run)
        assert sorted(path.name for path in (run.rows_path / "train").iterdir()) == rows
    file.write_bytes(before)
    resume(run)
    found = load_training_rows(run)
    assert len(found.store) == 18


def test_the_rows_of_a_run_are_found_by_its_own_key(tmp_path):
    """Whatever a resume that was killed has left beside them."""
    run = stopped_run(tmp_path)
    for seed in range(7, 13):
        file = chats(tmp_path / "chats.jsonl", 19, seed=seed)
        recipe = run.recipe()
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"train": (DataFile(path=str(file)),)})}
        )
        preparing.prepare(recipe, root=tmp_path, run=run)
    assert len(list((run.rows_path / "train").glob("*.json"))) == 7
    found = load_training_rows(run)
    assert len(found.store) == 18


def test_a_run_that_began_before_an_option_was_there_is_resumed(tmp_path, monkeypatch):
    straight = train(tiny_recipe(tmp_path), root=tmp_path / "straight")
    later = ("data.encoding", "data.suffixes", "evaluation.samples_before", "evaluation.samples_on_the_way")
    right = preparing.run_identity
    with monkeypatch.context() as patch:  # as an earlier version recorded it
        patch.setattr(
            preparing,
            "run_identity",
            lambda *args, **how: {key: value for key, value in right(*args, **how).items() if not key.endswith(later)},
        )
        run = stopped(straight.recipe(), tmp_path / "runs", 3)
    found, expected = ([e.values for e in one.events() if e.kind == "step"] for one in (resume(run), straight))
    assert found == expected


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path):
    straight = train(tiny_recipe(tmp_path), root=tmp_path / "straight")
    run = stopped(straight.recipe(), tmp_path / "runs", 5)
    weights = run.checkpoints_path / "step-5" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-20:] = bytes(20)
    weights.write_bytes(content)
    resume(run)
    notes = [event.values["text"] for event in run.events() if event.kind == "note"]
    assert any("step-5" in note for note in notes)
    assert [path.name for path in run.checkpoints_path.glob("damaged*")]
    same_run(run, straight)


KILLS = int(os.environ.get("TUNESMITH_KILLS", "1"))
KILL_SEED = int(os.environ.get("TUNESMITH_KILL_SEED", "0"))


@pytest.mark.slow  # one that is killed in a step: test_every_task.py
def test_killed_anywhere_it_ends_as_the_same_run(tmp_path):  # trap: R5
    """SIGKILL at random moments, over as many runs as it takes; TUNESMITH_KILLS=2000 for a long one."""
    sections = {"train": {"epochs": 1}, "checkpoint": {"every": 2}, "evaluation": {"every": 3}}
    killed, finished = kill_runs(tmp_path, tiny_recipe(tmp_path, dropout=0.1, **sections), kills=KILLS, seed=KILL_SEED)
    print(json.dumps({"kills": killed, "runs finished": finished}))
    assert finished >= 1


@pytest.mark.parametrize("kind", ["start", "evaluation"])
def test_a_run_killed_before_its_first_checkpoint_keeps_what_its_plan_said(tmp_path, monkeypatch, kind):
    """What was predicted and chosen at the first start is neither made nor found again when it is resumed, also where
    it was not logged yet."""

    def cannot(*arguments, **options):
        raise ModelError("no shapes")

    class Killed(BaseException):
        pass

    def on_event(event) -> None:
        if event.kind == kind:
            raise Killed

    def plans(run: Run) -> list[Event]:
        return [event for event in run.events() if event.kind == "plan"]

    monkeypatch.setattr(forecasting, "fit", cannot)
    recipe = tiny_recipe(tmp_path, train={"max_steps": 1})
    [first] = plans(train(recipe, root=tmp_path / "straight"))
    with pytest.raises(Killed):
        train(recipe, root=tmp_path / "runs", listener=Listener(on_event=on_event))
    [run] = runs(tmp_path / "runs")
    assert checkpoint.newest(run.checkpoints_path, lambda path, why: None) is None
    assert len(plans(run)) == (kind == "evaluation")
    [said] = [text for text in first.values["warnings"] if text.startswith("memory and time could not be forecast")]
    resume(run)
    assert plans(run)[0].values == first.values
    assert said in run.read_json("report.json")["notes"]
