"""Whole runs of peft's methods: the same loop, folder, resume, chat and export as every other method."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from export.exports import quick
from often import often
from serve.batches import run as run_batch
from serve.engines import says
from tiny_run import same_run, stop_at, tiny_recipe
from tunesmith.errors import InputError, Stopped
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.export.export_run import export_run
from tunesmith.generation.padded import generate
from tunesmith.generation.scheduler import Scheduler
from tunesmith.inference.load import load_any, load_run
from tunesmith.models.attention import use_packed_attention
from tunesmith.recipe.methods import PeftMethod
from tunesmith.recipe.schema import Recipe
from tunesmith.runs.folder import Run, runs
from tunesmith.serve.protocol import EngineOptions
from tunesmith.serve.registry import open_registry
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import resume, train

SETTINGS = {
    "IA3": {},
    "LN_TUNING": {},
    "TRAINABLE_TOKENS": {"token_indices": list(range(64))},
}


def recipe_of(folder: Path, kind: str, arch: str = "llama", **sections: object) -> Recipe:
    recipe = tiny_recipe(folder, arch=arch, **sections)
    return recipe.model_copy(update={"method": PeftMethod(kind=kind, settings=SETTINGS[kind])})


@pytest.fixture(scope="module", params=often(SETTINGS, "IA3", "TRAINABLE_TOKENS"))
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp(f"peft-{request.param}")
    return train(recipe_of(folder, request.param), root=folder / "runs")


def kind_of(run: Run) -> str:
    method = run.recipe().method
    assert isinstance(method, PeftMethod)
    return method.kind


def plan_of(run: Run) -> dict:
    return next(event.values for event in run.events() if event.kind == "plan")


@pytest.mark.slow  # what is trained is restored: tests/methods/test_contract.py
def test_stopped_and_resumed_is_the_same_run(straight: Run, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(straight.recipe(), root=tmp_path, listener=stop_at(3))
    same_run(resume(runs(tmp_path)[0]), straight)


def test_what_the_plan_says(straight: Run) -> None:
    plan = plan_of(straight)
    notes = "; ".join(plan["warnings"])
    assert plan["layout"] == "packed"
    assert f"peft puts {kind_of(straight)} on" in notes
    assert ("cannot be merged" in notes) == (kind_of(straight) == "TRAINABLE_TOKENS")


def test_the_loaded_result_scores_what_the_run_said(straight: Run) -> None:
    setup = prepare(straight.recipe(), root=straight.path.parent)
    told = [event.values for event in straight.events() if event.kind == "evaluation"][-1]
    speaker = load_run(straight)
    if setup.held_collator.layout == "packed":
        use_packed_attention(speaker.model)
    outcomes = predict_rows(
        speaker.model, setup.task, setup.held_collator, [int(i) for i in setup.rows.held_rows], tokens_per_pass=256
    )
    found = float(outcomes.losses_I.sum() / outcomes.counts_I.sum())
    assert found == pytest.approx(told["loss"], abs=1e-4)  # the run cut other passes


def test_the_base_is_looked_at_under_the_method(straight: Run) -> None:
    ids = torch.arange(3, 12)[None]
    base = load_any(str(straight.path), root=Path("runs"), base=True)
    tuned = load_any(str(straight.path), root=Path("runs"))
    assert tuned.has_base
    with torch.no_grad():
        expected, live = base.model(ids).logits, tuned.model(ids).logits
        with tuned.adapter_disabled():
            assert torch.equal(tuned.model(ids).logits, expected)
    assert not torch.equal(live, expected)


def test_exported_as_an_adapter_it_is_what_was_tuned(
    straight: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch)
    done = export_run(straight, "adapter", out=tmp_path / "out", offline=True)
    assert done.found.carried == pytest.approx(1.0, abs=1e-3)
    assert done.loaded_by.startswith("peft ")
    card = (done.path / "README.md").read_text("utf-8")
    assert f"{kind_of(straight)} of the peft library" in card
    assert "Loads in peft. For other programs" in card


def test_merged_where_it_is_a_change_of_weights(straight: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    if kind_of(straight) != "TRAINABLE_TOKENS":
        done = export_run(straight, "merged", out=tmp_path / "out", offline=True)
        assert done.found.carried == pytest.approx(1.0, abs=1e-2)
        assert "model.layers.0.mlp.down_proj.weight" in load_file(done.path / "model.safetensors")
        return
    for target in ("merged", "gguf", "ollama", "onnx"):
        with pytest.raises(InputError, match=f"^--to {target}: TRAINABLE_TOKENS is not a change"):
            export_run(straight, target, out=tmp_path / "out", offline=True)


def test_served_it_answers_as_it_does_alone(straight: Run) -> None:
    options = EngineOptions(max_new_tokens=16, threads=1, offline=True)
    serving = open_registry([str(straight.path)], root=Path("runs"), options=options, note=lambda note: None)
    voice = serving.models[straight.path.name]
    ask = says(voice.card.name, "hello dog", max_tokens=8)
    heard = run_batch(Scheduler(voice.decoder, streams=1), voice.prepare(0, ask, options))
    tuned = load_run(straight)
    [alone] = generate(tuned.model, tuned.renderer, [voice.prompt_ids(ask)], 8)
    assert heard[0].texts[0] == alone.text


def test_another_run_starts_from_it_where_it_can_be_merged(straight: Run, tmp_path: Path) -> None:
    recipe = straight.recipe().model_copy(update={"model": str(straight.path)})
    if kind_of(straight) != "TRAINABLE_TOKENS":
        assert train(recipe, root=tmp_path).state() == "done"
    else:
        with pytest.raises(InputError, match="cannot be merged"):
            train(recipe, root=tmp_path)
