"""`kernels: fast` and `kernels: plain` are one training: the option says how, not what."""

from types import SimpleNamespace

import pytest

from tiny_run import tiny_recipe
from tunesmith.models import short_row_attention
from tunesmith.training import setup as setups
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import prepare


def losses(folder, **sections) -> list[float]:
    folder.mkdir()
    setup = prepare(tiny_recipe(folder, **sections), root=folder)
    return [event.values["loss"] for event in training_steps(setup)]


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("float32", 1e-4),  # the order of sums differs
        ("bfloat16", 0.05),  # 12 steps of weights that are rounded to 2^-8 each
    ],
)
def test_both_ways_train_alike_and_fast_is_what_runs_by_default(tmp_path, monkeypatch, precision, tolerance):
    seen = []
    real = short_row_attention.short_row_attention
    monkeypatch.setattr(
        short_row_attention, "short_row_attention", lambda *args, **how: seen.append(1) or real(*args, **how)
    )
    plain = losses(tmp_path / "plain", kernels="plain", precision=precision)
    assert not seen
    fast = losses(tmp_path / "fast", precision=precision)
    assert bool(seen) == (precision == "bfloat16")
    assert fast == pytest.approx(plain, abs=tolerance)
    assert plain[-1] < plain[0] - 0.1  # it learns: equal losses of a model that stands still prove nothing


@pytest.mark.parametrize(
    ("device", "kernels", "is_sharded", "noted"),
    [
        ("cpu", "fast", False, ["slower"]),
        ("cuda", "fast", False, ["slower"]),
        ("cuda:1", "fast", False, ["slower"]),
        ("cuda", "plain", False, []),
        ("cuda", "fast", True, []),
        ("mps", "fast", False, []),
    ],
)
def test_layers_compute_by_nodes_on_processors_and_cards(monkeypatch, device, kernels, is_sharded, noted):
    monkeypatch.setattr(setups, "use_fast_layers", lambda model: ["slower"])
    world = SimpleNamespace(is_sharded=is_sharded)
    assert setups._use_fast_layers(None, world, kernels=kernels, device=device) == noted
