"""A run starts from the result of another: adapt to a domain, then tune for a task."""

import json
import re
import shutil
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_tasks import rows_of, task_recipe, write
from tunesmith.errors import RunError
from tunesmith.planning.decisions import Decisions
from tunesmith.runs.background import in_background
from tunesmith.runs.folder import Run
from tunesmith.training import merged_base
from tunesmith.training.inputs import find_inputs
from tunesmith.training.merged_base import start_from
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    """A run of one step, which tests copy."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = task_recipe(folder, "text", "causal", method="lora", train={"max_steps": 1})
    return train(recipe, root=folder / "runs")


def copy_of(run: Run, root: Path) -> Run:
    return Run(shutil.copytree(run.path, root / run.path.name))


def test_two_runs_that_start_from_one_adapter_at_once_merge_it_once(trained, tmp_path, monkeypatch):
    first = copy_of(trained, tmp_path / "runs")
    merges, load_run = [], merged_base.load_run

    def slow(*args, **how):
        merges.append(args)
        time.sleep(0.6)  # three times as long as the lock is waited for
        return load_run(*args, **how)

    monkeypatch.setattr(merged_base, "load_run", slow)
    monkeypatch.setattr("tunesmith.runs.folder._LOCK_PATIENCE_S", 0.2)
    begun = [
        in_background(partial(start_from, str(first.path), root=tmp_path / "runs", offline=True)) for _ in range(2)
    ]
    assert {one.result().model for one in begun} == {str(first.merged_path)}
    assert len(merges) == 1


def test_a_merged_base_whose_distance_is_being_measured_is_waited_for(trained, tmp_path):
    run = copy_of(trained, tmp_path / "runs")
    start_from(str(run.path), root=tmp_path, offline=True)
    assert merged_base._is_merged(run)
    (run.merged_path / merged_base.MADE_OF).unlink()  # which is written last, after the distance
    assert not merged_base._is_merged(run)


def test_the_wait_for_a_run_that_another_process_has_ends(trained, tmp_path, monkeypatch):
    first = copy_of(trained, tmp_path / "runs")
    monkeypatch.setattr(merged_base, "MERGE_WAIT_S", 0.1)
    monkeypatch.setattr("tunesmith.runs.folder._LOCK_PATIENCE_S", 0.1)
    with first.lock(), pytest.raises(RunError, match="in use by process"):
        start_from(str(first.path), root=tmp_path / "runs", offline=True)


def test_a_plan_names_the_run_that_it_starts_from_and_the_room_that_takes(trained, tmp_path):
    root = tmp_path / "runs"
    first = copy_of(trained, root)
    second = train(trained.recipe().model_copy(update={"model": str(first.path)}), root=root)
    plan = next(event.values for event in second.events() if event.kind == "plan")
    assert plan["model"] == second.report["model"] == f"{first.path.name} (merged)"
    assert any(re.search(r"merged into its base in \S+/merged \([\d.]+ [KM]iB\)", text) for text in plan["warnings"])
    assert second.report["name"] == second.path.name


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


def test_a_merged_base_says_how_far_it_is_from_what_was_measured(trained, tmp_path):
    first = copy_of(trained, tmp_path / "runs")
    start = start_from(str(first.path), root=tmp_path / "runs", offline=True)
    assert re.search(
        r"in 16 bits its KL divergence from the model that was measured is \S+ nats, its loss [+-]", start.note
    )
    assert start.precision is None
    facts = json.loads((first.merged_path / "merged.json").read_text())
    assert not facts["needs_float32"]
    again = start_from(str(first.path), root=tmp_path / "runs", offline=True)
    assert again == start  # of the file


def test_a_merged_base_is_compared_on_some_targets_of_a_long_row(tmp_path, monkeypatch):
    """All of them took 24 GB with a window of a thousand tokens and fifty thousand words."""
    recipe = task_recipe(tmp_path, "text", "causal", method="lora", train={"max_steps": 1})
    for file in (*recipe.data.train, *recipe.data.eval):
        write(Path(file.path), [{"text": f"{row['text']} " * 40} for row in rows_of("text", 12)])
    run = train(recipe, root=tmp_path / "runs")
    seen, distance = [], merged_base._distance

    def noted(measured, merged, speaker):
        seen.extend([*measured, *merged])
        return distance(measured, merged, speaker)

    monkeypatch.setattr(merged_base, "_distance", noted)
    start_from(str(run.path), root=tmp_path / "runs", offline=True)
    lines = (run.evaluation_path / "after.jsonl").read_text().splitlines()
    assert max(json.loads(line)["count"] for line in lines) > 64
    assert max(len(logits_NV) for logits_NV, _ in seen) == 64
    assert all(len(logits_NV) == len(targets_N) for logits_NV, targets_N in seen)


def test_it_takes_float32_where_16_bits_would_change_answers(tmp_path, monkeypatch):
    recipe = task_recipe(tmp_path, "text", "causal", method="lora", train={"epochs": 1}, precision="bfloat16")
    first = train(recipe, root=tmp_path / "runs")
    monkeypatch.setattr(merged_base, "MOST_KL", -1.0)  # any change is too large
    start = start_from(str(first.path), root=tmp_path / "runs", offline=True)
    assert start.precision == "float32"
    merged = load_file(first.merged_path / "model.safetensors")
    assert {one.dtype for one in merged.values()} == {torch.float32}
    auto = recipe.model_copy(update={"model": str(first.path), "precision": "auto"})
    decisions = Decisions(auto)
    found = find_inputs(decisions, root=tmp_path / "runs", offline=True)
    assert found.recipe.precision == "float32"
    [choice] = [choice for choice in decisions.choices if choice.key == "precision"]
    assert choice.reason == "16 bits would change the answers of the run it starts from"
    narrow = auto.model_copy(update={"precision": "bfloat16"})
    given = find_inputs(Decisions(narrow), root=tmp_path / "runs", offline=True)
    assert given.recipe.precision == "bfloat16"
