"""`python -m benchmarks.roofline`: products counted once each, and a plot of what was raced."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import roofline
from tiny_model import tiny_model


def test_every_layer_but_the_head_is_counted() -> None:
    model = tiny_model("llama", vocab_size=100)
    config = model.config
    layers, head = roofline.shapes_of(model)
    assert sum(layers.values()) == 7 * config.num_hidden_layers  # q, k, v, o, gate, up, down
    assert layers[config.intermediate_size, config.hidden_size] == config.num_hidden_layers
    assert head == (config.hidden_size, 100)


@pytest.mark.parametrize(("method", "products"), [("full", 3 * 3), ("lora", 2 * 3 + 3 * 2 * 2)])
def test_floor_is_forward_inputs_and_what_is_trained(
    method: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "median_seconds", lambda way: 1.0)
    shapes = Counter({(8, 4): 2})  # full: two layers and the head, each with three products
    # LoRA: two products of each and of the head, and three of A and of B beside the two layers.
    assert roofline.floor_seconds(shapes, (8, 9), tokens=5, targets=2, method=method, rank=3) == products


def test_plot_is_drawn(tmp_path: Path) -> None:
    groups = {"lora, rows chat": {"Tunesmith": [400.0, 410.0], "TRL, tuned": [150.0]}}
    roofline.draw(groups, {"lora, rows chat": 800.0}, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text("utf-8")
