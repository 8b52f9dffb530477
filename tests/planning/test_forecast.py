"""A forecast counts what a run does, and one that cannot be made ends no run."""

from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tiny_run import chats, model_folder, tiny_recipe
from tiny_tasks import task_recipe, write
from tunesmith.cli.app import app
from tunesmith.errors import ModelError, RecipeError
from tunesmith.planning import devices
from tunesmith.planning.devices import Device, named
from tunesmith.planning.forecast import step_seconds, targets_of
from tunesmith.planning.memory import Load, Sizes
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare

SIZES = Sizes(
    weights=1000, masters=0, optimizer=0, trained_parameters=0, itemsize=4, layers=4, recomputable=4, features=40,
    kept=1.0, first=0, linear_weights=500, trains_linear=1.0, hidden=4, heads=2, outputs=50, trains_output=False,
    fused_loss=True, can_pack=True,
)  # fmt: skip
SAID = "memory and time could not be forecast: "


def test_it_rests_on_the_recipe_and_names_the_micro_batch(tmp_path):
    forecast = resolve_run(tiny_recipe(tmp_path, train={"tokens_per_pass": 96}), root=tmp_path).forecast
    assert forecast.fits
    assert forecast.memory.total == sum(forecast.memory.parts().values())
    assert forecast.heavy.load.tokens <= 96
    assert forecast.duration.counts["training"] == 12
    assert forecast.disk.checkpoints == 3 * (forecast.disk.result + 2 * forecast.disk.result + 56 * 2)


def test_the_tokens_that_a_plan_names_are_those_of_the_rows(tmp_path):
    """Not the padding that a processor computes in bfloat16."""
    forecast = resolve_run(tiny_recipe(tmp_path, precision="bfloat16"), root=tmp_path).forecast
    tokens = sum(forecast.sampler.lengths_of(forecast.heavy.rows))
    assert forecast.values()["pass"]["tokens"] == tokens < forecast.heavy.load.tokens


def test_a_row_of_several_classes_is_one_target(tmp_path):
    """Its logits are those of one position, though the loss counts each class."""
    recipe = task_recipe(tmp_path, "classify", "encoder", data={"label_kind": "many"})
    rows = [{"text": f"the old apple {i}", "label": ["a", "b", "c"][: i % 4]} for i in range(24)]
    for path in (*recipe.data.train, *recipe.data.eval):
        write(Path(path.path), rows)
    found = resolve_run(recipe, root=tmp_path)
    assert set(found.rows.store.denominators) == {3.0}
    assert found.forecast.heavy.load.targets == len(found.forecast.heavy.rows)
    assert targets_of(found.rows.store)[found.rows.train_rows].sum() == len(found.rows.train_rows)


def test_time_is_products_attention_bytes_and_starts():
    slow = Device("cpu", "cpu", 2**30, products=1.0, bandwidth=inf, launch=0.0)
    # 3 products of 500 weights, forward, backward to inputs and to weights; logits twice; 2 operations each.
    load = Load(tokens=10, targets=2)
    how: dict[str, Any] = {"micro_batches": 1, "recomputed": 0}
    assert step_seconds(SIZES, load, device=slow, **how) == 2 * 500 * 10 * 3 + 2 * 4 * 50 * 2 * 2
    assert step_seconds(SIZES, load, device=slow, micro_batches=1, recomputed=4) == 2 * 500 * 10 * 4 + 1600
    starts = Device("cpu", "cpu", 2**30, products=inf, bandwidth=inf, launch=1.0)
    assert step_seconds(SIZES, load, device=starts, **how) == 4 * 150
    attends = Device("cpu", "cpu", 2**30, products=inf, bandwidth=inf, launch=0.0, attention=2.0)
    load = Load(tokens=10, targets=2, squares=100)
    assert step_seconds(SIZES, load, device=attends, **how) == 4 * 4 * 100 * 7 / 2


@pytest.mark.parametrize("target", ["sizes_of", "peak", "heaviest"])
def test_a_forecast_that_fails_is_said_and_the_run_is_prepared(tmp_path, monkeypatch, target):
    def fail(*args: Any, **how: Any) -> Any:
        raise ModelError("no config") if target == "sizes_of" else KeyError("nothing")

    monkeypatch.setattr(f"tunesmith.planning.forecast.{target}", fail)
    setup = prepare(tiny_recipe(tmp_path), root=tmp_path)
    assert setup.forecast is None
    assert setup.recipe.train.checkpointed_layers == 0
    assert any(note.startswith(SAID) for note in setup.notes)


@pytest.mark.parametrize("error", [RecipeError("method.targets: no layer is named so"), KeyboardInterrupt()])
def test_what_was_given_wrongly_and_an_interrupt_end_it(tmp_path, monkeypatch, error):
    def fail(*args: Any, **how: Any) -> Any:
        raise error

    monkeypatch.setattr("tunesmith.planning.memory.attach", fail)
    with pytest.raises(type(error)):
        resolve_run(tiny_recipe(tmp_path), root=tmp_path)


@pytest.mark.parametrize("verb", ["plan", "selftest"])
def test_other_verbs_go_on_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    def fail(*args: Any, **how: Any) -> Any:
        raise NotImplementedError("aten::of_a_processor")

    devices._measured.cache_clear()
    monkeypatch.setattr("tunesmith.planning.devices._fastest", fail)
    model, data = model_folder(tmp_path / "model"), chats(tmp_path / "rows.jsonl", 20)
    words = {"plan": ["plan", str(model), str(data), "--no-probe"], "selftest": ["selftest", str(model)]}[verb]
    done = CliRunner().invoke(app, [*words, "--runs", str(tmp_path / "runs"), "--offline"])
    assert done.exit_code == 0, done.output
    assert (SAID + "NotImplementedError: aten::of_a_processor" in done.output) or verb == "selftest"


def test_memory_of_a_card_counts_its_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card says is free is without the context of this process, which the forecast counts."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    assert devices.room("cuda:0") == 11 * 2**30 + devices.CUDA_CONTEXT
    assert named("24G").room == 24 * devices.GB
