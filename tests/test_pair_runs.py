"""Runs of encoder–decoders on rows end to end: told, training as padded ones, resumed, or refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tiny_run import values_of
from tiny_tasks import encoder_decoder_folder, padded_folder, rows_of, task_recipe, write
from tunesmith.cli.app import app
from tunesmith.errors import Stopped
from tunesmith.evaluation.general import speaks
from tunesmith.models import distances, grouped
from tunesmith.recipe.knobs import Recipe
from tunesmith.runs.folder import Run, runs
from tunesmith.training import setup as preparing
from tunesmith.training.loop import training_steps
from tunesmith.training.resolve import foresee
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.summary import foreseen_values, plan_values
from tunesmith.training.trainer import Listener, resume, train


def recipe_of(folder: Path, *, model_dropout: float = 0.0, **sections: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    model = str(encoder_decoder_folder(folder / "t5", dropout=model_dropout))
    return task_recipe(folder, "summarize", "encoder_decoder", rows=40, model=model, **sections)


def losses(setup: Setup) -> list[float]:
    return [event.values["loss"] for event in training_steps(setup)]


def test_the_command_line_trains_on_rows_end_to_end_and_says_so(tmp_path):
    model = encoder_decoder_folder(tmp_path / "t5", dropout=0.1)
    rows = write(tmp_path / "rows.jsonl", rows_of("generate", 40))
    words = ["train", str(model), str(rows), "--runs", str(tmp_path / "runs"), "--offline", "--json"]
    words += ["--set", "train.rows_per_step=8", "--set", "evaluation.samples=1", "--set", "device=cpu"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    run = runs(tmp_path / "runs")[0]
    [plan] = [event.values for event in run.events() if event.kind == "plan"]
    assert plan["layout"] == "ragged_pairs"
    assert not [event for event in run.events() if event.kind == "note" and "padded" in event.values["text"]]
    assert run.state() == "done"
    surprising = json.loads((run.path / "evaluation" / "surprising.json").read_text())
    assert len(surprising["rows"]) > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_plan_foresees_what_the_run_lays_out_and_computes(tmp_path, precision):
    """In bfloat16 passes are filled up on both sides, which counts as padding."""
    recipe = recipe_of(tmp_path, precision=precision, train={"epochs": 1})
    foreseen = foresee(recipe, root=tmp_path)
    assert foreseen.forecast is not None
    assert foreseen.forecast.plan.layout == "ragged_pairs"
    setup = prepare(recipe, root=tmp_path)
    told = plan_values(setup)
    steps = list(training_steps(setup))
    tokens, computed = (sum(event.values[key] for event in steps) for key in ("tokens", "computed"))
    assert told["layout"] == "ragged_pairs"
    assert foreseen_values(foreseen)["padding"] == told["padding"] == pytest.approx(1 - tokens / computed, abs=1e-4)
    assert (told["padding"] == 0) == (precision == "float32")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_same_training_as_in_padded_batches(tmp_path, monkeypatch, method):  # trap: T13
    """20 steps in float32: 1e-4 is rounding in another order."""
    recipe = recipe_of(tmp_path, method=method)
    packed = losses(prepare(recipe, root=tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "layouts_of", lambda kind, device: ("encoder_decoder",))
        setup = prepare(recipe, root=tmp_path)
        assert setup.plan.layout == "encoder_decoder"
        padded = losses(setup)
    assert packed == pytest.approx(padded, abs=1e-4)
    assert padded[-1] < padded[0] - 0.1


def test_both_ways_of_attention_train_alike(tmp_path, monkeypatch):
    recipe = recipe_of(tmp_path / "fast")
    seen = []
    real = grouped.attend
    monkeypatch.setattr(grouped, "attend", lambda *args, **how: seen.append(1) or real(*args, **how))
    fast = losses(prepare(recipe, root=tmp_path))
    assert seen
    seen.clear()
    plain = losses(prepare(recipe.model_copy(update={"kernels": "plain"}), root=tmp_path))
    assert not seen
    assert fast == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("layers", [0, 3])
def test_stopped_anywhere_it_goes_on_as_if_it_had_not(tmp_path, layers):  # trap: R1
    """With dropout, checkpoints in between, and layers that are recomputed."""
    recipe = recipe_of(tmp_path, model_dropout=0.1, train={"checkpointed_layers": layers})
    straight = train(recipe, root=tmp_path / "straight")
    for step in (2, 13):
        calls = iter(range(1000))
        with pytest.raises(Stopped):
            train(
                recipe,
                root=tmp_path / f"stopped-{step}",
                listener=Listener(should_stop=lambda calls=calls, step=step: next(calls) == step),
            )
        run: Run = runs(tmp_path / f"stopped-{step}")[0]
        assert values_of(resume(run).events()) == values_of(straight.events())


def test_where_memory_ends_a_pass_is_halved(tmp_path, monkeypatch):
    """Twice as many passes, the same loss but for rounding."""
    recipe = recipe_of(tmp_path, train={"rows_per_step": 8, "tokens_per_pass": 256})
    expected = losses(prepare(recipe, root=tmp_path))
    setup, calls = prepare(recipe, root=tmp_path), iter(range(1000))
    real = type(setup.feed).batch

    def ending(feed: Any, members: Any, **how: Any) -> Any:
        if next(calls) == 0:
            raise MemoryError
        return real(feed, members, **how)

    monkeypatch.setattr(type(setup.feed), "batch", ending)
    assert losses(setup) == pytest.approx(expected, abs=1e-4)


def test_it_is_not_asked_to_go_on_with_a_text(tmp_path):
    setup = prepare(recipe_of(tmp_path), root=tmp_path)
    assert speaks(setup.head, is_causal=True, room=setup.room)
    assert not setup.speaks


def test_a_model_that_cannot_says_why_and_runs_padded(tmp_path):
    recipe = recipe_of(tmp_path).model_copy(update={"model": str(padded_folder(tmp_path / "bart"))})
    foreseen = foresee(recipe, root=tmp_path)
    assert foreseen.forecast is not None
    assert foreseen.forecast.plan.layout == "encoder_decoder"
    setup = prepare(recipe, root=tmp_path)
    assert setup.plan.layout == "encoder_decoder"
    assert any("it counts its positions from the beginning of a pass" in note for note in setup.notes)


def test_a_run_whose_rows_would_read_each_other_is_padded(tmp_path, monkeypatch):
    real = distances._forward

    def moved(module: Any, own: Any, hidden: Any, *args: Any, **given: Any) -> Any:
        if given.get("segments") is not None and given.get("position_bias") is not None:
            given["position_bias"] = given["position_bias"] + 100 * given["position_bias"].roll(1, -1)
        return real(module, own, hidden, *args, **given)

    monkeypatch.setattr(distances, "_forward", moved)
    setup = prepare(recipe_of(tmp_path), root=tmp_path)
    assert setup.plan.layout == "encoder_decoder"
    assert any("packed rows change its logits" in note for note in setup.notes)
