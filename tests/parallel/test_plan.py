"""A plan for several devices: each one's memory, less time, what would fill them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AlbertConfig, AlbertForMaskedLM
from typer.testing import CliRunner

from tiny_model import tiny_model
from tiny_run import tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.cli.app import app
from tunesmith.errors import InputError, RecipeError
from tunesmith.planning import devices
from tunesmith.planning.defaults import Facts, _rows_per_step
from tunesmith.planning.devices import NVLINK, PCIE, link, named, named_group
from tunesmith.planning.forecast import Forecast, heaviest
from tunesmith.planning.memory import layers_to_split
from tunesmith.recipe.docs import as_yaml
from tunesmith.recipe.load import load, validate
from tunesmith.tasks import TASKS
from tunesmith.training.resolve import ResolvedRun, _few_rows, resolve_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("plan")
    recipe = tiny_recipe(made, rows=120, train={"rows_per_step": 16, "tokens_per_pass": 64})
    (made / "recipe.yaml").write_text(as_yaml(recipe, comments=False))
    return made


def planned(
    folder: Path, number: int, name: str = "H100", *settings: str, room: int | None = None
) -> tuple[ResolvedRun, Forecast]:
    recipe = load(str(folder / "recipe.yaml"), [f"devices={number}", *settings])
    card = named(name)
    found = resolve_run(recipe, root=folder, device=card if room is None else replace(card, room=room))
    assert found.forecast is not None
    return found, found.forecast


def test_each_device_computes_its_part_of_every_step(folder: Path) -> None:
    (_, one), (found, four) = planned(folder, 1), planned(folder, 4)
    assert found.recipe.devices == 4
    assert one.duration is not None
    assert four.duration is not None
    assert one.sampler.steps_per_epoch == four.sampler.steps_per_epoch
    assert four.duration.prices["training"] < one.duration.prices["training"]
    assert one.exchange_seconds == 0 < four.exchange_seconds
    assert four.values()["group"] == {"devices": 4, "exchange_seconds": four.exchange_seconds, "split": 0}
    assert "group" not in one.values()
    assert four.memory.total > one.memory.total - four.device.room // 100  # the whole model on each, and NCCL


def test_the_heaviest_pass_of_any_device_counts(folder: Path) -> None:
    found, forecast = planned(folder, 4)
    store = found.rows.store
    heavy = heaviest(forecast.sampler, 3, store)
    passes = [rows for step in (1, 2, 3) for rank in range(4) for rows in _of(forecast, rank, step)]
    sizes = [int(store.lengths[list(rows)].sum() + store.targets[list(rows)].sum()) for rows in passes]
    assert heavy.load.tokens + heavy.load.targets == max(sizes)


def _of(forecast: Forecast, rank: int, step: int) -> list[tuple[int, ...]]:
    return replace(forecast.sampler, part=(rank, 4)).step(step)


def noted(folder: Path, number: int, busy: float, *settings: str) -> list[str]:
    found, forecast = planned(folder, number, "H100", *settings)
    return _few_rows(found.recipe.train.rows_per_step, number, replace(forecast, busy=busy))


def test_few_rows_are_noted_with_the_cards_share_and_a_way_to_fill_them(folder: Path) -> None:
    (note,) = noted(folder, 8, 0.45)
    assert note.startswith("train.rows_per_step is 16, which leaves 8 devices 2 rows each: they compute 45 % of a")
    assert "27 would fill them, but are another update" in note
    assert noted(folder, 8, 0.8) == noted(folder, 1, 0.1) == []
    (small,) = noted(folder, 8, 0.01)
    assert "This model is too small to fill them all: fewer devices take about as long" in small
    assert [note for note in planned(folder, 8)[0].notes if "8 devices" in note]


@pytest.mark.parametrize(("number", "rows"), [(1, 16), (4, 16), (8, 32), (16, 50), (64, 50)])
def test_more_devices_get_larger_steps_while_an_epoch_has_twenty(number: int, rows: int) -> None:
    recipe = validate({"task": "chat", "devices": number})
    facts = Facts(8_000_000_000, "cuda", "causal", np.full(1000, 400, np.int32))
    assert _rows_per_step(recipe, TASKS["chat"], facts)[0] == rows
    many = Facts(8_000_000_000, "cuda", "causal", np.full(100_000, 400, np.int32))
    assert _rows_per_step(recipe, TASKS["chat"], many)[0] == min(64, max(16, 4 * number))


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
    monkeypatch.setattr(devices, "resident_bytes", lambda: 100)
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


FULL = "method=full"


def test_split_layers_leave_each_device_its_part_of_them(folder: Path) -> None:
    """Of layers of b bytes four devices keep a quarter each, and two layers of the two while they compute."""
    (_, whole), (found, split) = (planned(folder, 4, "H100", FULL, *more) for more in ((), ("shard=true",)))
    assert found.recipe.shard is True
    group = split.values()["group"]
    assert group["split"] > 0 == whole.values()["group"]["split"]
    assert group["exchange_seconds"] > 0
    assert split.memory.weights == whole.memory.weights - group["split"] * 3 // 4 + group["split"]
    assert split.memory.optimizer < whole.memory.optimizer
    assert split.disk.checkpoints == pytest.approx(whole.disk.checkpoints, rel=1e-3)  # they hold whole tensors


def test_layers_are_gathered_while_others_compute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.planning.forecast.link", lambda device: 1.0)  # slower than any step
    split = planned(folder, 4, "H100", FULL, "shard=true")[1]
    assert split.duration is not None
    assert split.duration.prices["training"] == split.exchange_seconds


def test_each_device_reads_the_general_text_whole(folder: Path) -> None:
    one, four = (planned(folder, number, "H100", "evaluation.general=true")[1].duration for number in (1, 4))
    assert one is not None
    assert four is not None
    assert one.prices["measuring"] / 2 < four.prices["measuring"]
    assert one.counts["measuring"] / 4 < four.counts["measuring"] < one.counts["measuring"]


def test_rows_that_are_looked_at_before_are_one_forward_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = planned(folder, 1)[1].duration
    monkeypatch.setattr("tunesmith.planning.forecast.has_prepass", lambda recipe: True)
    looked = planned(folder, 1)[1].duration
    assert plain is not None
    assert looked is not None
    assert looked.prices["training"] > plain.prices["training"]


def test_layers_are_split_where_a_whole_model_does_not_fit(folder: Path) -> None:
    big = ("train.tokens_per_pass=4096", "train.checkpointed_layers=0", "optim.name=adamw", FULL)
    whole, split = (planned(folder, 4, "H100", *big, f"shard={value}")[1] for value in ("false", "true"))
    assert split.memory.total < whole.memory.total
    room = (split.memory.total + whole.memory.total) // 2
    found, forecast = planned(folder, 4, "H100", *big, room=room)
    choice = next(choice for choice in found.choices if choice.key == "shard")
    assert (found.recipe.shard, forecast.sizes.gathered) == (True, split.sizes.gathered)
    assert choice.reason.startswith("a whole model on each device would need")
    assert planned(folder, 4, "H100", *big)[0].recipe.shard is False


REFUSED = {
    "method.name=dora": "method.name: dora",
    "method.also_train=[embed_tokens]": "method.also_train",
    "method.targets=[all-linear,experts]": "method.targets: experts",
    "precision=float16": "precision: float16",
    "devices=1": "devices: 1",
    "method=full optim.name=muon": "optim.name: muon",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_what_cannot_be_split_is_refused_by_its_option(folder: Path, settings: str) -> None:
    recipe = load(str(folder / "recipe.yaml"), ["devices=2", "shard=true", *settings.split()])
    with pytest.raises(RecipeError, match=f"shard: true: not with {REFUSED[settings]}"):
        resolve_run(recipe, root=folder)


def test_a_model_without_layers_of_their_own_is_not_split(tmp_path: Path) -> None:
    """ALBERT runs one layer again and again; Zamba's layers have a block in common."""
    recipe = task_recipe(tmp_path, "text", "encoder", devices=2, shard=True)
    config = AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    AlbertForMaskedLM(config).save_pretrained(recipe.model)
    with pytest.raises(RecipeError, match=r"shard: true: not with model: .*: it has no list of layers"):
        resolve_run(recipe, root=tmp_path)
    model = tiny_model(vocab_size=64)
    assert len(layers_to_split(model, recipe.model)) == 2
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(RecipeError, match="its layers share weights"):
        layers_to_split(model, recipe.model)
