"""A run starts from the result of another: adapt to a domain, then tune for a task."""

import json
import shutil
import time
from functools import partial

import pytest

from tiny_tasks import rows_of, task_recipe, write
from tunesmith.errors import RunError
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run
from tunesmith.training import inputs
from tunesmith.training.inputs import start_from
from tunesmith.training.trainer import train


def evaluation(run: Run, name: str) -> float:
    return next(e.values["loss"] for e in run.events() if e.kind == "evaluation" and e.values["name"] == name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_second_run_begins_where_the_first_ended(tmp_path, method):
    root = tmp_path / "runs"
    recipe = task_recipe(tmp_path, "text", "causal", method=method, optim={"lr": 1e-2})
    first = train(recipe, root=root)
    second = train(recipe.model_copy(update={"model": "last"}), root=root)
    # 1e-5: the same float32 weights, once as base and adapter, once merged
    assert evaluation(second, "before") == pytest.approx(evaluation(first, "after"), rel=1e-5)
    assert evaluation(second, "before") < evaluation(first, "before")
    plan = next(event for event in second.events() if event.kind == "plan")
    assert any(f"starts from the result of {first.path}" in text for text in plan.values["warnings"])
    assert "last" not in second.recipe().model
    if method == "full":
        return
    merged = first.path / "merged" / "config.json"  # made once and kept
    made = merged.stat().st_mtime_ns
    train(recipe.model_copy(update={"model": str(first.path)}), root=root)
    assert merged.stat().st_mtime_ns == made
    assert json.loads(merged.read_text())["architectures"]


def test_two_runs_that_start_from_one_adapter_at_once_merge_it_once(tmp_path, monkeypatch):
    recipe = task_recipe(tmp_path, "text", "causal", method="lora", train={"max_steps": 1})
    first = train(recipe, root=tmp_path / "runs")
    merges, load_run = [], inputs.load_run

    def slow(*args, **how):
        merges.append(args)
        time.sleep(2)  # the lock is waited for for a second
        return load_run(*args, **how)

    monkeypatch.setattr(inputs, "load_run", slow)
    begun = [
        in_background(partial(start_from, str(first.path), root=tmp_path / "runs", offline=True)) for _ in range(2)
    ]
    assert {one.result()[0] for one in begun} == {str(first.merged_path)}
    assert len(merges) == 1


def test_the_wait_for_a_run_that_another_process_has_ends(tmp_path, monkeypatch):
    first = train(
        task_recipe(tmp_path, "text", "causal", method="lora", train={"max_steps": 1}), root=tmp_path / "runs"
    )
    monkeypatch.setattr(inputs, "MERGE_WAIT_S", 0.1)
    with first.lock(), pytest.raises(RunError, match="in use by process"):
        start_from(str(first.path), root=tmp_path / "runs", offline=True)


def test_domain_then_task(tmp_path):
    root = tmp_path / "runs"
    adapted = train(task_recipe(tmp_path, "text", "encoder", method="full"), root=root)
    recipe = task_recipe(tmp_path, "classify", "encoder", method="lora")
    tuned = train(recipe.model_copy(update={"model": str(adapted.path)}), root=root)
    assert tuned.state() == "done"
    assert tuned.recipe().model == str(adapted.model_path)


def test_a_classifier_goes_on_with_its_head_and_the_order_of_its_classes(tmp_path):
    root = tmp_path / "runs"
    recipe = task_recipe(tmp_path, "classify", "encoder", method="lora", data={"labels": ["place", "fruit"]})
    first = train(recipe, root=root)
    go_on = recipe.model_copy(update={"model": str(first.path), "data": recipe.data.model_copy(update={"labels": ()})})
    second = train(go_on, root=root)
    assert second.recipe().data.labels == ("place", "fruit")
    assert evaluation(second, "before") == pytest.approx(evaluation(first, "after"), rel=1e-5)


def test_another_class_makes_a_new_head_and_says_so(tmp_path):
    root = tmp_path / "runs"
    recipe = task_recipe(tmp_path, "classify", "encoder", method="full")
    first = train(recipe, root=root)
    file = tmp_path / "classify.jsonl"
    write(file, [*rows_of("classify", 24), {"text": "the small", "label": "size"}, {"text": "a big", "label": "size"}])
    second = train(recipe.model_copy(update={"model": str(first.path)}), root=root)
    assert second.recipe().data.labels == ("fruit", "place", "size")
    plan = next(event for event in second.events() if event.kind == "plan")
    assert any("classifier.weight" in text for text in plan.values["warnings"])


def test_a_run_without_a_result_is_refused(tmp_path):
    root = tmp_path / "runs"
    recipe = task_recipe(tmp_path, "text", "causal", method="lora")
    run = Run.create(root, "begun", "model: x\n")
    with pytest.raises(RunError, match=r"no result yet.*resume"):
        train(recipe.model_copy(update={"model": str(run.path)}), root=root)


def test_a_merged_base_that_was_removed_is_made_again(tmp_path):
    root = tmp_path / "runs"
    recipe = task_recipe(tmp_path, "text", "causal", method="lora", train={"epochs": 1})
    runs = [train(recipe, root=root)]
    for seed in (1, 2):
        again = recipe.model_copy(update={"model": str(runs[-1].path), "seed": seed})
        runs.append(train(again, root=root))
        shutil.rmtree(runs[0].merged_path)
    assert [run.started_from() for run in runs] == [None, runs[0], runs[1]]
    # 1e-5: the same float32 weights, once as base and adapter, once merged
    assert evaluation(runs[2], "before") == pytest.approx(evaluation(runs[1], "after"), rel=1e-5)
