"""Runs with adapters on experts: planned, stopped and resumed, exported, told what is adapted."""

import json
from pathlib import Path

import pytest

from export.exports import quick
from tiny_run import logits_of, same_run, stop_at, tiny_recipe
from tunesmith.errors import Stopped
from tunesmith.export.export_run import export_run
from tunesmith.inference.load import load_run
from tunesmith.models.quantized_experts import QuantizedExperts
from tunesmith.runs.folder import Run
from tunesmith.training.trainer import resume, train

METHOD = {"rank": 4, "alpha": 8, "targets": ["all-linear", "experts"]}


def recipe_in(folder: Path, name: str = "lora"):
    few = {"max_steps": 5}
    return tiny_recipe(folder, arch="qwen3_moe", method={"name": name, **METHOD}, train=few)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("experts")
    return train(recipe_in(folder), root=folder / "runs")


@pytest.mark.slow  # what is trained is restored: tests/methods/test_contract.py
def test_stopped_and_resumed_is_the_same_run(finished: Run) -> None:
    folder = finished.path.parents[1]
    with pytest.raises(Stopped):
        train(finished.recipe(), out=folder / "stopped", listener=stop_at(3))
    same_run(resume(Run.open(str(folder / "stopped"), folder)), finished)


def test_the_plan_says_what_is_adapted_and_counts_it(finished: Run) -> None:
    plan = next(event.values for event in finished.events() if event.kind == "plan")
    (said,) = [note for note in plan["warnings"] if note.startswith("adapters of rank 4 on")]
    assert said.startswith("adapters of rank 4 on gate_up_proj and down_proj of 4 experts in each of 2 layers")
    # Rank times inputs and outputs: attention of 64 and 32 numbers, experts of 64 and 2 times 32.
    linear, experts = 2 * (64 + 64) + 2 * (64 + 32), 4 * ((64 + 64) + (32 + 64))
    assert plan["trained_parameters"] == 2 * 4 * (linear + experts)


def test_the_merged_export_is_the_tuned_model(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = export_run(finished, "merged", out=finished.path / "merged-export")
    assert done.found.carried == pytest.approx(1, abs=1e-3)


def test_the_adapter_export_is_read_by_peft_alone(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    done = export_run(finished, "adapter", out=finished.path / "adapter-export")
    config = json.loads((done.path / "adapter_config.json").read_text("utf-8"))
    assert config["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    card = (done.path / "README.md").read_text("utf-8")
    assert "Loads in peft. For other programs export merged." in card


@pytest.mark.slow
def test_a_run_on_packed_experts_answers_and_resumes(tmp_path: Path) -> None:
    done = train(recipe_in(tmp_path, "qlora"), root=tmp_path / "runs")
    live = load_run(done)
    assert any(isinstance(module, QuantizedExperts) for module in live.model.modules())
    assert logits_of(live).isfinite().all()
    with pytest.raises(Stopped):
        train(done.recipe(), out=tmp_path / "stopped", listener=stop_at(3))
    same_run(resume(Run.open(str(tmp_path / "stopped"), tmp_path)), done)
