"""A plan for several devices: each one's memory, less time, what would fill them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiny_run import tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import InputError
from tunesmith.planning import devices
from tunesmith.planning.devices import NVLINK, PCIE, link, named, named_group
from tunesmith.planning.forecast import Forecast, heaviest, mean_balance
from tunesmith.recipe.docs import as_yaml
from tunesmith.training.resolve import ResolvedRun, resolve_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan")
    recipe = tiny_recipe(made, rows=120, train={"rows_per_step": 16, "tokens_per_pass": 64})
    (made / "recipe.yaml").write_text(as_yaml(recipe, comments=False))
    return made


def planned(folder: Path, number: int, name: str = "H100") -> tuple[ResolvedRun, Forecast]:
    from tunesmith.recipe.load import load

    recipe = load(str(folder / "recipe.yaml"), [f"devices={number}"])
    found = resolve_run(recipe, root=folder, device=named(name))
    assert found.forecast is not None
    return found, found.forecast


def test_each_device_computes_its_part_of_every_step(folder: Path) -> None:
    (_, one), (found, four) = planned(folder, 1), planned(folder, 4)
    assert found.recipe.devices == 4
    assert one.duration is not None
    assert four.duration is not None
    assert one.plan.steps_per_epoch == four.plan.steps_per_epoch
    assert four.duration.step < one.duration.step
    assert 0.5 < four.balance <= 1
    assert four.balance == mean_balance(four.plan)
    assert one.balance == 1
    assert one.sum_seconds == 0 < four.sum_seconds
    assert four.values()["group"] == {"devices": 4, "balance": four.balance, "sum_seconds": four.sum_seconds}
    assert "group" not in one.values()
    assert four.memory.total > one.memory.total - four.device.room // 100  # the whole model on each, and NCCL


def test_the_heaviest_pass_of_any_device_counts(folder: Path) -> None:
    found, forecast = planned(folder, 4)
    store = found.rows.store
    tokens = max(heavy.load.tokens for heavy in heaviest(forecast.plan, 3, store))
    passes = [rows for step in (1, 2, 3) for rank in range(4) for rows in _of(forecast, rank, step)]
    assert tokens == max(int(store.lengths[list(rows)].sum()) for rows in passes)


def _of(forecast: Forecast, rank: int, step: int) -> list[tuple[int, ...]]:
    from dataclasses import replace

    return replace(forecast.plan, part=(rank, 4)).step(step)


def test_few_rows_are_said_with_what_would_fill_the_devices(folder: Path) -> None:
    found, _ = planned(folder, 8)
    note = next(note for note in found.notes if "8 devices" in note)
    assert note.startswith("train.rows_per_step is 16, which leaves 8 devices few rows each")
    assert "32 would fill them" in note
    assert not any("devices few rows" in note for note in planned(folder, 4)[0].notes)


def test_a_card_may_be_several() -> None:
    assert named_group("8xH100") == (named("H100-80G"), 8)
    assert named_group("2 x 24G") == (named("24G"), 2)
    assert named_group("H100") == (named("H100"), 1)
    for odd in ("0xH100", "8xNothing", "xH100"):
        with pytest.raises(InputError, match="--device"):
            named_group(odd)


def test_sums_go_as_fast_as_the_cards_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    assert link(named("H100")) == link(named("A100-80G")) == NVLINK
    assert link(named("RTX4090")) == link(named("L4")) == PCIE


def test_processes_of_a_processor_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "resident", lambda: 100)
    assert devices.share_of_room("cpu", 1100, 4) == 350
    assert devices.share_of_room("cuda", 1100, 4) == 1100


def test_the_plan_says_it_in_words(folder: Path) -> None:
    words = ["plan", "--recipe", str(folder / "recipe.yaml"), "--device", "4xH100", "--runs", str(folder), "--offline"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "runs on: 4 × H100-80G" in said
    assert "on each device at most" in said
    assert "devices: 4, each with the whole model and a part of each step" in said
