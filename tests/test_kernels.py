"""`kernels: fast` and `kernels: plain` are one training: the option says how, not what."""

from __future__ import annotations

import pytest

from tiny_run import tiny_recipe
from tunesmith.models import grouped, norms
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import prepare


def losses(folder, **sections) -> list[float]:
    folder.mkdir()
    setup = prepare(tiny_recipe(folder, **sections), root=folder)
    return [event.values["loss"] for event in training_steps(setup)]


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ("float32", 1e-4),  # norms alone differ, in the last bit of their gradients
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
    monkeypatch.setattr(grouped, "attend", lambda *args, **how: pytest.fail("products were used"))
    monkeypatch.setattr(norms, "_RmsNorm", None)
    losses(tmp_path / "plain", kernels="plain", precision="bfloat16")


def test_fast_is_what_runs_by_default(tmp_path, monkeypatch):
    seen = []
    real = grouped.attend
    monkeypatch.setattr(grouped, "attend", lambda *args, **how: seen.append(1) or real(*args, **how))
    losses(tmp_path / "fast", precision="bfloat16")
    assert seen
