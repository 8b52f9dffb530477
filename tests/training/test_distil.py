"""Runs that learn from a teacher: at their rows' tokens by lists that are kept, and at answers of their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_run import model_folder, same_run, stopped, tiny_recipe
from tunesmith.cli.options import build_recipe
from tunesmith.errors import DoesNotFitError, ModelError, RecipeError, RunError
from tunesmith.inference.load import load_any
from tunesmith.inference.measure import evaluate_file
from tunesmith.recipe.origin import moved_to
from tunesmith.runs.folder import Run
from tunesmith.training import teacher as teachers
from tunesmith.training.local_teacher import LocalTeacher, refuse_other_vocabulary
from tunesmith.training.probe import Found, measure
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare
from tunesmith.training.taught_answers import prompt_of
from tunesmith.training.trainer import resume, train

FULL = {"method": "full", "optim": {"lr": 3e-3}}
SMALL = {"evaluation": {"samples": 1, "sample_tokens": 4, "general": False, "surprising": 0}}


def taught(folder, *, teacher: Any = None, on_policy: bool = False, **sections: Any):
    """6 steps of 3 rows; 2 are held out. The teacher has the weights of another seed."""
    folder.mkdir(parents=True, exist_ok=True)
    distil = {"teacher": str(teacher or model_folder(folder / "teacher", seed=5)), "top": 16, "on_policy": on_policy}
    distil |= {"max_new_tokens": 6} if on_policy else {}
    distil |= sections.pop("distil", {})
    settings = {**SMALL, **FULL, "train": {"epochs": 2, "max_steps": 6}, **sections}
    return tiny_recipe(folder, task="distil", distil=distil, **settings)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Any, Run]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(taught(folder), root=folder / "runs")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Any, Run]:
    folder = tmp_path_factory.mktemp("drawn")
    return folder, train(taught(folder, on_policy=True), root=folder / "runs")


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [event.values for event in run.events() if event.kind == "step"]


def measures_of(run: Run, name: str) -> dict[str, Any]:
    return next(e.values["measures"] for e in run.events() if e.kind == "evaluation" and e.values["name"] == name)


def logits(path, row) -> torch.Tensor:
    """[N, V] at the row's targets, by the library's own forward pass in float64."""
    model = AutoModelForCausalLM.from_pretrained(path).double().eval()
    ids = torch.tensor(row.ids.astype(np.int64))[None]
    with torch.no_grad():
        return model(ids).logits[0][np.flatnonzero(row.trained) - 1]


def grouped(q_NV: torch.Tensor, p_NV: torch.Tensor, top: int) -> torch.Tensor:
    q_NV, p_NV = q_NV.softmax(-1), p_NV.softmax(-1)
    ids_NK = p_NV.topk(top).indices
    rest_p, rest_q = (1 - of_NV.gather(1, ids_NK).sum(1) for of_NV in (p_NV, q_NV))
    listed_p, listed_q = p_NV.gather(1, ids_NK), q_NV.gather(1, ids_NK)
    return (listed_p * (listed_p / listed_q).log()).sum() + (rest_p * (rest_p / rest_q).log()).sum()


def test_the_first_loss_is_the_divergence_by_both_models_alone(straight):  # trap: G33
    folder, run = straight
    setup = prepare(run.recipe(), root=folder / "other")
    rows = [setup.store.row(row) for row in steps_of(run)[0]["rows"]]
    teacher, student = run.recipe().distil.teacher, run.recipe().model
    expected = sum(grouped(logits(student, row), logits(teacher, row), 16) for row in rows)
    targets = sum(int(row.trained.sum()) for row in rows)
    assert steps_of(run)[0]["loss"] == pytest.approx(float(expected) / targets, abs=1e-5)


@pytest.mark.slow
def test_lists_of_the_token_before_are_found(tmp_path, monkeypatch):  # trap: G33 planted
    lists = LocalTeacher.lists

    def unshifted(self, rows):
        for i, values_NC in lists(self, rows):
            yield i, np.roll(values_NC, 1, axis=0)

    monkeypatch.setattr(LocalTeacher, "lists", unshifted)
    wrong = train(taught(tmp_path, train={"max_steps": 1}), root=tmp_path / "runs")
    with pytest.raises(AssertionError):
        test_the_first_loss_is_the_divergence_by_both_models_alone((tmp_path, wrong))


@pytest.mark.parametrize("kind", ["straight", "drawn"])
def test_the_divergence_falls_on_rows_that_it_was_not_trained_on(kind, request):
    _, run = request.getfixturevalue(kind)
    before, after = measures_of(run, "before"), measures_of(run, "after")
    assert before.keys() == {"loss", "agreement", "answer_loss"}
    lines = [json.loads(line) for line in (run.path / "evaluation" / "after.jsonl").read_text().splitlines()]
    told = [event.values for event in run.events() if event.kind == "evaluation"]
    assert told[-1]["targets"] == sum(line["count"] for line in lines)
    assert after["loss"]["value"] < 0.97 * before["loss"]["value"]
    report = json.loads((run.path / "report.json").read_text())
    assert report["changes"].keys() >= {"loss", "agreement"}


@pytest.mark.parametrize("kind", ["straight", "drawn"])
def test_a_run_that_goes_on_is_one_that_never_stopped(kind, request, monkeypatch):  # trap: G34
    folder, whole = request.getfixturevalue(kind)
    run = stopped(whole.recipe(), folder / "stopped", 4)
    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "lists", None)  # they are in its folder
        same_run(resume(run), whole)


@pytest.mark.slow
def test_answers_that_do_not_follow_from_the_step_are_found(drawn, monkeypatch):  # trap: G34 planted
    folder, whole = drawn
    run = stopped(whole.recipe(), folder / "planted", 3)
    calls: list[int] = []

    def counted(store, rows, *, seed, step):
        calls.append(step)
        return [len(calls) * 100 + i for i, _ in enumerate(rows)]

    monkeypatch.setattr("tunesmith.training.taught_answers.seeds_of", counted)
    with pytest.raises(AssertionError):
        same_run(resume(run), whole)


def test_a_step_on_policy_tells_of_its_answers(drawn):
    _, run = drawn
    for values in steps_of(run):
        assert values["longest_answer"] <= 6
        assert values["targets"] == pytest.approx(len(values["rows"]) * values["answer_tokens"])
        assert 0 <= values["ended"] <= 1


def test_a_model_that_is_its_teacher_learns_nothing(tmp_path):
    student = model_folder(tmp_path / "model-llama")
    for on_policy in (False, True):
        folder = tmp_path / str(on_policy)
        run = train(taught(folder, teacher=student, on_policy=on_policy, train={"max_steps": 1}), root=folder / "runs")
        assert abs(steps_of(run)[0]["loss"]) < 1e-6
        assert measures_of(run, "before")["agreement"]["value"] == 1


def test_lists_are_found_again_by_another_run(straight, monkeypatch):
    folder, run = straight

    def again(self, rows):
        raise AssertionError("they are there")

    monkeypatch.setattr(LocalTeacher, "lists", again)
    other = train(moved_to(run.recipe()).model_copy(update={"name": "again"}), root=folder / "runs")
    assert [values["loss"] for values in steps_of(other)] == [values["loss"] for values in steps_of(run)]


def test_a_prompt_is_what_comes_before_the_last_answer(straight):
    folder, run = straight
    setup = prepare(run.recipe(), root=folder / "runs")
    for i in range(len(setup.store)):
        row = setup.store.row(i)
        num = len(prompt_of(row))
        assert row.trained[num:].any()
        assert not row.trained[num - 1]
        assert row.trained[num]


def test_vocabularies_that_spell_a_probe_alike_are_two(straight):  # trap: G31
    _, run = straight
    tokenizer = load_any(run.recipe().model, root=run.path.parent).renderer.tokenizer

    class Swapped:
        """Two of its tokens, which no probe has, have each other's ids."""

        def get_vocab(self):
            vocabulary = dict(tokenizer.get_vocab())
            first, second = sorted(vocabulary, key=vocabulary.get)[-3:-1]
            vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
            return vocabulary

    refuse_other_vocabulary("same", tokenizer, tokenizer)
    with pytest.raises(RecipeError, match="Their probabilities cannot be compared"):
        refuse_other_vocabulary("other", tokenizer, Swapped())


@pytest.mark.parametrize(
    ("distil", "more", "words"),
    [
        ({"teacher": None}, {}, "distil.teacher: is missing"),
        ({"teacher": "http://localhost:8000/v1"}, {}, r"distil\.model: is missing"),
        ({"max_new_tokens": 9}, {}, "is for drawn answers"),
        ({}, {"loss": {"z_loss": 0.1}}, "a teacher says more"),
        ({"on_policy": True}, {"evaluation": {"surprising": 5}}, "answers are drawn anew"),
    ],
)
def test_what_cannot_be_taught_is_refused(tmp_path, distil, more, words):
    recipe = taught(tmp_path, distil=distil, **more)
    with pytest.raises(RecipeError, match=words):
        resolve_run(recipe, root=tmp_path / "runs")


def test_a_teacher_that_is_not_there_or_is_the_model_itself_is_named(tmp_path):
    recipe = taught(tmp_path)
    plan = resolve_run(taught(tmp_path, teacher=Path(recipe.model)), root=tmp_path / "runs")
    assert [note for note in plan.notes if "it is the model that learns" in note]
    with pytest.raises(ModelError, match=r"^distil\.teacher: "):
        resolve_run(taught(tmp_path, teacher=tmp_path / "none"), root=tmp_path / "runs")
    typed = {"words": {"task": "distil", "distil.teacher": "./none"}, "settings": None, "root": tmp_path / "runs"}
    with pytest.raises(ModelError, match=r"^distil\.teacher: \./none"):
        build_recipe("train", recipe.model, [recipe.data.train[0].path], held_out=None, recipe=None, **typed)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "free_bytes", lambda folder: 1000)
    with pytest.raises(DoesNotFitError, match=r"Lower distil\.top"):
        train(taught(tmp_path), root=tmp_path / "runs")


def test_memory_is_foreseen_and_tried_with_the_teacher(tmp_path):
    recipe = taught(tmp_path)
    plan = resolve_run(recipe, root=tmp_path / "runs")
    assert plan.forecast is not None
    weights = sum(weight.nbytes for weight in AutoModelForCausalLM.from_pretrained(recipe.distil.teacher).parameters())
    assert plan.forecast.memory.other_models == pytest.approx(weights, rel=0.3)
    result, setup = Found(), prepare(recipe, root=tmp_path / "runs")
    for _ in measure(setup, tmp_path / "tried", result):
        pass
    assert result.steps
    assert setup.teacher is not None
    assert setup.teacher.loaded is None, "it leaves the memory before the steps"


def test_a_result_is_measured_by_its_rows_alone(straight, tmp_path):
    folder, run = straight
    found = evaluate_file(load_any(str(run.path), root=folder / "runs"), run.recipe().data.train[0].path, samples=0)
    assert "token_accuracy" in found.measures


def test_another_teacher_is_another_run(straight, tmp_path):
    _, whole = straight
    run, other = stopped(whole.recipe(), tmp_path / "stopped", 2), model_folder(tmp_path / "other")
    weights = Path(whole.recipe().distil.teacher) / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes((other / "model.safetensors").read_bytes())
    try:
        with pytest.raises(RunError, match="teacher"):
            resume(run)
    finally:
        weights.write_bytes(before)
