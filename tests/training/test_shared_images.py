"""Rows that begin with one picture compute picture and beginning once, and learn what whole rows learn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiny_vision import picture, png, vision_recipe
from tunesmith.data.prefixes import Keys, prefix_keys
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.shared_prefixes import KEY
from tunesmith.types import Batch, Row, Source

ASKED = "Look at the picture for a long while, and say what is the {} thing on it"
SEVERAL = {"llava": "<image>", "idefics3": "<image>Another picture: <image>"}
"""Images of a row: one, and two with text between them."""


def setup_of(folder: Path, family: str = "llava") -> Setup:
    """Three questions about each of two groups of pictures, all of one size."""
    lines = []
    for group in ("a", "b"):
        names = [f"{group}{i}.png" for i in range(SEVERAL.get(family, "<image>").count("<image>"))]
        for number, name in enumerate(names):
            (folder / name).write_bytes(png(picture(10 * ord(group) + number)))
        for which in ("red", "green", "blue"):
            prompt = SEVERAL.get(family, "<image>") + ASKED.format(which)
            lines.append({"images": names, "prompt": prompt, "completion": f"{which} {group}"})
    rows = folder / "shared.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    more: dict[str, Any] = {"data": {"train": [str(rows)], "held_out": 0}, "train": {"rows_per_step": 6}}
    return prepare(vision_recipe(folder, family, evaluation={"samples": 0}, **more), root=folder / "runs")


def both(setup: Setup) -> tuple[Batch, Batch]:
    """A batch of all rows: with what they share computed once, and whole."""
    assert setup.collator.shares, [choice for choice in setup.choices if choice.key == KEY]
    rows = [int(i) for i in setup.rows.train_rows]
    return setup.collator.batch(rows, step=1), replace(setup.collator, shares=False).batch(rows, step=1)


def learnt(setup: Setup, batch: Batch) -> list[torch.Tensor]:
    """The loss, and the gradient of every trained weight."""
    setup.model.zero_grad()
    with setup.attachment.perturbed():
        loss = setup.task.loss_sum(setup.model, batch)
        loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in setup.attachment.trained.values())]


def assert_alike(setup: Setup) -> None:
    """Losses and gradients are those of whole rows; float32: sums in another order."""
    for ours, theirs in zip(*(learnt(setup, batch) for batch in both(setup)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("family", SEVERAL)
def test_pictures_and_what_is_between_them_are_computed_once(family: str, tmp_path: Path) -> None:
    setup = setup_of(tmp_path, family)
    shared, whole = both(setup)
    assert len(whole.images) == 3 * len(shared.images) == 6 * SEVERAL[family].count("<image>")
    assert shared.num_computed < 0.7 * whole.num_computed
    assert_alike(setup)


# trap: I24
def test_a_picture_is_no_other_picture_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tokens said all: rows of the second picture would be shown the first."""
    setup = setup_of(tmp_path)

    def alike(row: Row, image_token: int | None) -> Keys:
        return prefix_keys(replace(row, images=(0,) * len(row.images)), image_token)

    monkeypatch.setattr("tunesmith.data.prefixes.prefix_keys", alike)
    shared, _ = both(setup)
    assert len(shared.images) == 1
    with pytest.raises(AssertionError):
        assert_alike(setup)


def test_a_beginning_that_ends_before_the_pictures_is_shared_without_them() -> None:
    ids = np.arange(10, 40, dtype=np.int32)
    ids[[12, 15]] = 7
    rows = [Row(ids, np.ones(30, np.bool_), Source("x", 1), images=images) for images in ((1, 2), (1, 3))]
    first, second = (prefix_keys(row, 7) for row in rows)
    assert np.flatnonzero(first != second).tolist() == [12]
    assert first[12] < 0
    assert (np.delete(first, 12) == np.delete(ids, 12)).all()


def test_a_model_that_counts_positions_by_images_computes_rows_whole(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "qwen2_5_vl")
    (choice,) = [choice for choice in setup.choices if choice.key == KEY]
    assert not choice.value
    assert "counts positions by the images" in choice.reason
