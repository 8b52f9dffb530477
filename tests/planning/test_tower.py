"""What images take of a run, foreseen: passes of the vision tower, its time and its memory."""

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest

from tiny_vision import EACH_FAMILY, ROWS, picture, vision_folder, vision_recipe
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.models.image_features import kept_vectors
from tunesmith.models.load import load_tokenizer
from tunesmith.models.resolve_model import ModelRef
from tunesmith.models.vision import vision_of
from tunesmith.planning import tower as towers
from tunesmith.planning.devices import Device
from tunesmith.planning.forecast import Forecast
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare

PROJECTOR = {"method": {"name": "lora", "rank": 4, "also_train": ["projector"]}}


def setup_of(folder: Path, **sections: Any) -> Setup:
    return prepare(vision_recipe(folder, **sections), root=folder / "runs")


def forecast_of(folder: Path, **sections: Any) -> Forecast:
    forecast = setup_of(folder, **sections).forecast
    assert forecast is not None
    assert forecast.duration is not None
    return forecast


def test_a_frozen_tower_sees_each_image_once_a_run_and_that_is_foreseen(tmp_path: Path) -> None:
    setup = setup_of(tmp_path)
    assert setup.forecast is not None
    assert setup.forecast.duration is not None
    assert any(note.startswith("images: 6 different ones, 4 tokens each") for note in setup.notes)
    kept = kept_vectors(setup.model)
    kept.entries.clear()  # of rows that were tried packed
    before = kept.computed
    for _ in training_steps(setup):
        pass
    predict_rows(setup.model, setup.task, setup.held_collator, setup.rows.held_rows.tolist(), tokens_per_pass=256)
    assert setup.forecast.duration.counts["seeing"] == kept.computed - before == 6
    assert kept.seconds > 0
    tower, memory = setup.forecast.sizes.tower, setup.forecast.memory
    assert tower is not None
    assert memory.images == sum(seen.nbytes for seen in kept.entries.values()) == 6 * 4 * 32 * 4
    assert not tower.learns


def test_without_room_it_sees_them_in_every_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "MEMORY_SHARE", 0)
    setup = setup_of(tmp_path)
    assert setup.forecast is not None
    assert setup.forecast.duration is not None
    views = 2 * len(setup.rows.train_rows) + 2 * len(setup.rows.held_rows)
    assert setup.forecast.duration.counts["seeing"] == pytest.approx(views)
    assert setup.forecast.memory.images == 0


def test_a_projector_that_learns_takes_the_tower_into_every_step(tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    frozen, trained = forecast_of(tmp_path), forecast_of(tmp_path / "trained", **PROJECTOR)
    assert trained.duration is not None
    assert "seeing" not in trained.duration.counts
    assert trained.memory.images == 0
    assert trained.memory.activations > frozen.memory.activations
    tower = trained.sizes.tower
    assert tower is not None
    assert tower.learns


def test_time_and_memory_grow_with_the_image(tmp_path: Path) -> None:
    vision = vision_of(load_tokenizer(ModelRef("folder", vision_folder(tmp_path, "qwen3_vl"), "qwen3_vl"), None))
    assert vision is not None
    small, large = vision.measure(16, 16), vision.measure(32, 16)
    tower = towers.Tower(100, 10, 8, 2, 4, per_patch=96, vector=128, learns=False)
    assert [tower.patches(image) for image in (small, large)] == [16, 32]
    assert [image.tokens for image in (small, large)] == [4, 8]
    device = Device("cpu", "cpu", 2**30, products=1.0, bandwidth=1.0, launch=0.0)
    products = 2 * 100 * 16 + 2 * 10 * 4 + 4 * 2 * 4 * 16 * 16
    assert tower.seconds(small, device) == pytest.approx(products)
    attends = replace(device, products=inf, attention=2.0)
    assert tower.seconds(small, attends) == pytest.approx(4 * 2 * 4 * 16 * 16 / 2)
    starts = replace(device, products=inf, launch=1.0)
    assert tower.seconds(small, starts) == pytest.approx(2 * towers.OPERATIONS_STARTED + towers.READ, rel=1e-4)
    shown = towers.Shown(5, 1.0, 2, small, large)
    memory = tower.memory(shown, 2**30, images=3, itemsize=4, kept=2.0)
    assert (memory.kept, memory.activations) == (5 * 4 * 128, 0)
    assert memory.at_work == int(8 * large.numbers + 0.7 * 4 * 4 * 32)
    learning = replace(tower, learns=True).memory(shown, 2**30, images=3, itemsize=4, kept=2.0)
    assert (learning.kept, learning.activations) == (0, 3 * 16 * 2 * 4 * 8)


@pytest.mark.parametrize("family", EACH_FAMILY)
def test_an_image_is_measured_as_it_is_read(family: str, tmp_path: Path) -> None:
    vision = vision_of(load_tokenizer(ModelRef("folder", vision_folder(tmp_path, family), family), None))
    assert vision is not None
    ((width, height),) = ROWS[1]
    measures = vision.measure(width, height)
    ids = vision._processor.tokenizer(vision.expand(width, height)).input_ids
    assert measures.tokens == ids.count(vision.token_id) > 0
    assert measures.numbers == vision.pixels(picture(1, width, height))["pixel_values"].numel()
