"""`kernels: fast` and `kernels: plain` are one training: the option says how, not what."""

from __future__ import annotations

import pytest

from tiny_run import tiny_recipe
from tunesmith.models import short_row_attention
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
def test_both_ways_train_alike(tmp_path, precision, tolerance):
    how = {"precision": precision}
    fast = losses(tmp_path / "fast", kernels="fast", **how)
    plain = losses(tmp_path / "plain", kernels="plain", **how)
    assert fast == pytest.approx(plain, abs=tolerance)
    assert plain[-1] < plain[0] - 0.1  # it learns: equal losses of a model that stands still prove nothing


def test_plain_means_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(
        short_row_attention, "short_row_attention", lambda *args, **how: pytest.fail("products were used")
    )
    losses(tmp_path / "plain", kernels="plain", precision="bfloat16")


def test_fast_is_what_runs_by_default(tmp_path, monkeypatch):
    seen = []
    real = short_row_attention.short_row_attention
    monkeypatch.setattr(
        short_row_attention, "short_row_attention", lambda *args, **how: seen.append(1) or real(*args, **how)
    )
    losses(tmp_path / "fast", precision="bfloat16")
    assert seen
