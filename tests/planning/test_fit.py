"""Runs are made to fit, with as little changed as that takes, or are refused with what would fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tiny_run import tiny_recipe
from tunesmith.errors import DoesNotFitError, InputError, ModelError, RecipeError
from tunesmith.models import machine as memory_of_machine
from tunesmith.models.image_features import MEMORY_SHARE, KeptVectors
from tunesmith.phrases import set_words
from tunesmith.planning import devices
from tunesmith.planning import fit as fitting
from tunesmith.planning.decisions import with_options
from tunesmith.planning.devices import Device, named
from tunesmith.planning.forecast import Disk, Forecast, heaviest
from tunesmith.planning.memory import Heavy, Load, Memory
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import Recipe, resolved
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare

LAYERS = 10


def predictor(room: int, asked: list[Recipe] | None = None) -> fitting.Predict:
    """A run that holds 100, keeps 10 a layer for 2,048 tokens and 1 where the layer is recomputed; LoRA holds 20, QLoRA
    5."""

    def predict(recipe: Recipe) -> Forecast:
        if asked is not None:
            asked.append(recipe)
        layers = recipe.train.checkpointed_layers
        recomputed = 0 if layers == "auto" else layers
        share = resolved(recipe.train.tokens_per_pass) / 2048
        kept = int(share * (10 * (LAYERS - recomputed) + recomputed)) + (int(10 * share) if recomputed else 0)
        held = {"lora": 20, "qlora": 5}.get(recipe.method.name, 100)
        heavy = Heavy(1, (0,), False, Load(0, 0))
        memory, device = Memory(weights=held, activations=kept), Device("cpu", "cpu", room)
        return Forecast(
            memory, None, Disk(0, 0, 0), device, heavy, None, SimpleNamespace(recomputable=LAYERS), recomputed
        )

    return predict


def recipe_with(**train) -> Recipe:
    settings = {"tokens_per_pass": 2048, **train}
    return validate({"model": "m", "method": {"name": "full"}, "train": settings, "precision": "bfloat16"})


@pytest.mark.parametrize(
    ("room", "layers"),
    [
        (300, 0),  # 200 are needed, and 276 may be used without asking
        (210, 2),  # 193 may be used: 100 + 8 · 10 + 2 + 10
        (150, 8),
    ],
)
def test_only_as_many_layers_are_recomputed_as_memory_forces(room, layers):
    recipe, choices, forecast = fitting.fit(recipe_with(), predictor(room), longest=100, free_tokens=False)
    assert recipe.train.checkpointed_layers == layers
    assert forecast.memory.total <= (1 - fitting.MARGIN) * room
    fewer = replace_layers(recipe, max(layers - 1, 0))
    assert layers == 0 or predictor(room)(fewer).memory.total > (1 - fitting.MARGIN) * room
    assert [choice.key for choice in choices] == ["train.checkpointed_layers"]


def replace_layers(recipe: Recipe, layers: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpointed_layers": layers})})


def test_passes_get_smaller_only_where_recomputing_all_is_not_enough():
    recipe, choices, _ = fitting.fit(recipe_with(), predictor(125), longest=100, free_tokens=True)
    assert recipe.train.tokens_per_pass == 1024
    assert "the update is the same" in choices[0].reason


@pytest.mark.parametrize(
    ("learning", "room", "streams"),
    [
        (50, 120, 64),  # 20 + 64 are needed
        (50, 80, 32),
        (50, 78, 32),  # what learns takes 70, and fewer streams less than that
        (10, 30, 8),
        (3, 25, 4),  # of one prompt at least
    ],
)
def test_fewer_answers_are_drawn_together_where_their_keys_take_the_most(learning, room, streams):
    wanted = validate({"model": "m", "reinforce": {"grader": "g.py", "streams": 64, "samples": 4}})

    def predict(recipe: Recipe) -> Forecast:
        memory = Memory(weights=20, activations=max(learning, resolved(recipe.reinforce.streams)))
        return replace(predictor(room)(recipe_with()), memory=memory)

    recipe, choices = fitting.with_fewer_streams(wanted, predict)
    assert recipe.reinforce.streams == streams
    assert [choice.value for choice in choices] == [streams] * (streams < 64)
    alternatives = fitting.nearest(recipe_with().model_copy(update={"reinforce": wanted.reinforce}), predict, longest=9)
    assert alternatives[0] == ({"reinforce.streams": 4}, 20 + max(learning, 4))


def test_what_was_set_is_left_as_it_is():
    recipe, choices, forecast = fitting.fit(
        recipe_with(checkpointed_layers=0), predictor(10), longest=100, free_tokens=False
    )
    assert (recipe.train.checkpointed_layers, recipe.train.tokens_per_pass, choices) == (0, 2048, [])
    assert not forecast.fits


def nearest(recipe: Recipe, predict: fitting.Predict) -> dict[str, int]:
    """The nearest plans, as the command line takes them, with the bytes of each."""
    return {set_words(change): total for change, total in fitting.nearest(recipe, predict, longest=100)}


def test_a_refusal_names_the_nearest_plans_that_fit_and_their_predictions():
    predict = predictor(125)
    recipe = recipe_with(checkpointed_layers=0)
    error = fitting.refuse(replace(predict(recipe), alternatives=fitting.nearest(recipe, predict, longest=100)))
    assert (error.needed, error.room, error.exit_code) == (200, 125, InputError.exit_code)
    found = nearest(recipe, predict)
    assert list(found) == [
        "--set train.tokens_per_pass=512",
        "--set train.checkpointed_layers=10",
        "--set method=lora",
    ]
    assert all(total <= 125 and f"{words}  ({fitting.gib(total)})" in str(error) for words, total in found.items())
    assert "--set memory=warn" in str(error)


def lora_with(**method) -> Recipe:
    recipe = recipe_with(checkpointed_layers=LAYERS, tokens_per_pass=128)
    return with_options(recipe, {"method": {"name": "lora", **method}})


def test_a_packed_base_is_offered_if_lora_does_not_fit_and_keeps_options():
    asked: list[Recipe] = []
    recipe = lora_with(rank=8)
    assert list(nearest(recipe, predictor(12, asked))) == ["--set method.name=qlora"]
    assert {one.method.rank for one in asked if one.method.name == "qlora"} == {8}


def test_full_tuning_is_offered_a_packed_base_last():
    recipe = recipe_with(checkpointed_layers=LAYERS, tokens_per_pass=128)
    assert list(nearest(recipe, predictor(30))) == ["--set method=lora", "--set method=qlora"]


def test_what_a_model_cannot_take_is_not_offered():
    def predict(recipe: Recipe) -> Forecast:
        if recipe.method.name == "qlora":
            raise ModelError("it has no linear layer that can be quantised")
        return predictor(12)(recipe)

    assert nearest(lora_with(), predict) == {}


def test_nothing_is_offered_that_does_not_fit():
    predict = predictor(4)
    recipe = recipe_with(checkpointed_layers=0)
    assert nearest(recipe, predict) == {}
    assert "take a smaller model" in str(fitting.refuse(predict(recipe)))


def test_a_run_that_does_not_fit_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: devices.resident_bytes() // 2)
    monkeypatch.setattr("tunesmith.models.load.load_model", lambda *args, **how: pytest.fail("it was loaded"))
    with pytest.raises(DoesNotFitError, match=r"memory: this run needs .* GiB, and .* GiB are there \(weights"):
        prepare(tiny_recipe(tmp_path), root=tmp_path)


def test_it_is_run_all_the_same_where_the_recipe_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.planning.devices.room", lambda device: devices.resident_bytes() // 2)
    setup = prepare(tiny_recipe(tmp_path, memory="warn"), root=tmp_path)
    assert any("this run needs" in note for note in setup.notes)


def test_the_number_of_layers_to_recompute_is_checked_against_the_model(tmp_path):
    with pytest.raises(RecipeError, match=r"train.checkpointed_layers: 3"):
        prepare(tiny_recipe(tmp_path, train={"checkpointed_layers": 3}), root=tmp_path)


def test_a_plan_for_another_machine_takes_its_room(tmp_path):
    seen = resolve_run(tiny_recipe(tmp_path, device="auto", precision="auto"), root=tmp_path, device=named("H100"))
    assert (seen.forecast.device.name, seen.forecast.device.room) == ("H100-80G", 80 * 10**9)
    assert seen.recipe.precision == "bfloat16"
    assert seen.forecast.memory.runtime >= devices.CUDA_CONTEXT


@pytest.mark.parametrize(("device", "are_filled"), [(None, True), (named("H100"), False)])
def test_a_plan_fills_micro_batches_up_where_its_device_does(tmp_path, device, are_filled):
    recipe = tiny_recipe(tmp_path, device="cpu", precision="bfloat16")
    found = resolve_run(recipe, root=tmp_path, device=device)
    heavy = found.forecast.heavy
    assert (heavy.load.tokens != found.forecast.sampler.computed(heavy.rows)) is are_filled


def test_cards_are_named_or_known_by_their_memory_alone():
    assert named("24G").room == named("24GB").room == named("rtx4090").room == 24 * 10**9
    assert named("24G").products == 0
    with pytest.raises(InputError, match=r"--device: banana: not known. One of B200-180G"):
        named("banana")


def test_the_room_of_a_process_is_bounded_by_its_control_group(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**12))
    monkeypatch.setattr(memory_of_machine, "_group_free", lambda: 3 * 10**9)
    assert KeptVectors().room == 3 * 10**9 * MEMORY_SHARE  # of images, wherever they are looked at
    assert devices.room("cpu") == 3 * 10**9 + devices.resident_bytes()


def test_a_control_group_inside_another_is_bounded_by_both(tmp_path, monkeypatch):
    """As a job of Slurm or `systemd-run -p MemoryMax=4G` is, which no container hides."""
    for folder, most in (("", None), ("slurm", 9_000), ("slurm/job_7", None), ("slurm/job_7/step", 4_000)):
        group = tmp_path / "groups" / folder
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{most or 'max'}\n")
        (group / "memory.current").write_text("3000\n")
        (group / "memory.stat").write_text("anon 2000\ninactive_file 500\n")
    (tmp_path / "own").write_text("1:name=systemd:/\n0::/slurm/job_7/step\n")
    monkeypatch.setattr(memory_of_machine, "NAMED_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory_of_machine, "OWN_GROUP", tmp_path / "own")
    assert memory_of_machine._group_free() == 4_000 - 3_000 + 500
    (tmp_path / "own").write_text("0::/slurm/job_7\n")
    assert memory_of_machine._group_free() == 9_000 - 3_000 + 500
    (tmp_path / "own").write_text("0::/\n")
    assert memory_of_machine._group_free() == 2**63
    monkeypatch.setattr(memory_of_machine, "OWN_GROUP", tmp_path / "nowhere")
    assert memory_of_machine._group_free() == 2**63


@pytest.mark.parametrize("rows_per_step", [3, 18])
def test_the_heaviest_pass_is_one_that_will_occur(tmp_path, rows_per_step):
    setup = prepare(tiny_recipe(tmp_path, train={"rows_per_step": rows_per_step}), root=tmp_path)
    plan, store = setup.sampler, setup.rows.store
    passes = [rows for step in range(1, setup.total_steps + 1) for rows in plan.step(step)]
    found = heaviest(plan, setup.total_steps, store)
    assert found.rows in plan.step(found.step)
    weight = {rows: sum(store.lengths[list(rows)]) + sum(store.denominators[list(rows)]) for rows in passes}
    assert weight[found.rows] == max(weight.values())
