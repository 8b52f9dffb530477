"""Runs on rows with images: what is trained, repeated, kept and refused."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from often import slow
from tiny_run import same_run, stop_at, stopped
from tiny_vision import picture, png, questions, vision_recipe
from tunesmith.errors import DataError, RecipeError, RunError, Stopped
from tunesmith.generation.padded import generate
from tunesmith.models import image_features
from tunesmith.models.forward import logits_at_targets
from tunesmith.models.image_features import KeptVectors, kept_vectors
from tunesmith.models.packing_check import PackingCheck
from tunesmith.planning.decisions import Decisions
from tunesmith.recipe.load import validate
from tunesmith.recipe.schema import DataFile, Recipe
from tunesmith.runs.folder import runs
from tunesmith.training.image_parts import decide_seeing
from tunesmith.training.packed_rows import PACKED_NOTE, SeeingRows
from tunesmith.training.setup import prepare
from tunesmith.training.step import compute_gradients
from tunesmith.training.trainer import Listener, resume, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("images")
    return train(vision_recipe(folder), root=folder / "runs")


def test_a_run_learns_and_leaves_the_tower_as_it_is(finished: Any) -> None:
    losses = [event.values["loss"] for event in finished.events() if event.kind == "step"]
    assert losses[-1] < losses[0]
    names = load_file(finished.adapter_path / "adapter_model.safetensors")
    assert all("language_model" in name for name in names)
    assert (finished.adapter_path / "preprocessor_config.json").is_file()
    (plan,) = [event.values for event in finished.events() if event.kind == "plan"]
    assert any("vision frozen" in note for note in plan["warnings"])
    assert PACKED_NOTE in plan["warnings"]


def test_samples_show_their_images_small(finished: Any) -> None:
    shown = [event.values for event in finished.events() if event.kind == "sample"]
    assert shown
    assert all(sample["images"][0].startswith("data:image/jpeg;base64,") for sample in shown)


def test_rows_that_packing_would_change_are_padded_and_the_run_says_why(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, "gemma3")
    assert setup.sampler.layout == "padded"
    assert any("reads the tokens of an image in both directions" in note for note in setup.notes)
    long = replace(SeeingRows.of(setup.rows, setup.renderer.placeholders), too_long="")
    assert [len(row.images) for row in long.rows] == [1]


@pytest.mark.slow
def test_a_run_that_packs_learns_what_one_that_pads_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = train(vision_recipe(tmp_path, "qwen3_vl"), root=tmp_path / "packed")
    monkeypatch.setattr("tunesmith.training.setup.packed_agrees", lambda *args, **how: PackingCheck("not wanted"))
    padded = train(vision_recipe(tmp_path, "qwen3_vl"), root=tmp_path / "padded")
    losses = [[event.values["loss"] for event in run.events() if event.kind == "step"] for run in (packed, padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    layouts = [event.values["layout"] for run in (packed, padded) for event in run.events() if event.kind == "plan"]
    assert layouts == ["packed", "padded"]


def test_questions_about_one_picture_are_on_one_side(tmp_path: Path) -> None:  # trap: I10
    setup = prepare(vision_recipe(tmp_path), root=tmp_path / "runs")

    def check(sides: Any) -> None:
        trained, measured = (
            {number for row in rows_I.tolist() for number in store.images_at(row)} for store, rows_I in sides
        )
        assert measured
        assert trained.isdisjoint(measured)

    check(setup.rows.sides)
    store, every = setup.rows.store, np.arange(len(setup.rows.store))
    with pytest.raises(AssertionError):  # a split by rows
        check([(store, every[:-2]), (store, every[-2:])])


@pytest.mark.parametrize(
    "sections",
    [slow({}), {"method": {"name": "lora", "rank": 4, "also_train": ["projector"]}}],
    ids=["kept", "trained projector"],
)
def test_stopped_and_resumed_is_the_same_run(sections: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    straight = train(vision_recipe(tmp_path / "a", **sections), root=tmp_path / "straight")
    run = stopped(vision_recipe(tmp_path / "a", **sections), tmp_path / "stopped", at=2)
    same_run(resume(run), straight)


def test_a_run_is_the_same_with_nothing_kept_of_the_tower(finished: Any, tmp_path: Path) -> None:
    """Kept vectors are off until it is stopped, and emptied after each step from then on: the same bits."""
    kept: list[KeptVectors] = []

    def forget(event: Any, *, room: int | None) -> None:
        kept[:] = image_features._KEPT.values()
        for vectors in kept:
            vectors.entries.clear()
            vectors.room = vectors.room if room is None else room

    stopping, off = stop_at(2), partial(forget, room=0)
    listener = Listener(lambda event: (stopping.on_event(event), off(event)), should_stop=stopping.should_stop)
    with pytest.raises(Stopped):
        train(finished.recipe(), root=tmp_path, listener=listener)
    (run,) = runs(tmp_path)
    same_run(resume(run, listener=Listener(on_event=partial(forget, room=None))), finished)
    assert max(vectors.computed for vectors in kept) > 6, "each image was computed once all the same"


def test_the_tower_itself_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        setup = prepare(
            vision_recipe(tmp_path, method={"name": "full", "train": ["language", "projector", "vision"]}),
            root=tmp_path / "runs",
        )
        compute_gradients(setup, setup.sampler, 1)
        setup.attachment.collect_gradients()
        grads = {name: weight.grad for name, weight in setup.attachment.trained.items()}
        for ending in ("patch_embedding.weight", "layers.0.self_attn.q_proj.weight", "linear_1.weight"):
            (grad,) = (grad for name, grad in grads.items() if "language" not in name and name.endswith(ending))
            assert grad is not None
            assert grad.any()

    check()
    monkeypatch.setattr(image_features, "_together", torch.no_grad()(image_features._together))
    with pytest.raises(AssertionError):
        check()


def batch_of(setup: Any, *members: int) -> Any:
    return setup.collator.batch(list(members), step=1)


def setup_of(tmp_path: Path, family: str = "llava", **sections: Any) -> Any:
    setup = prepare(vision_recipe(tmp_path, family, **sections), root=tmp_path / "runs")
    setup.model.eval()
    return setup


@torch.no_grad()
def test_each_row_sees_its_own_image(tmp_path: Path) -> None:  # trap: I5
    setup = setup_of(tmp_path)

    def check(swapped: bool) -> None:
        batch = batch_of(setup, 0, 1)
        alone = [logits_at_targets(setup.model, batch_of(setup, row)) for row in (0, 1)]
        if swapped:
            batch = replace(batch, images=batch.images[::-1])
        assert torch.allclose(logits_at_targets(setup.model, batch), torch.cat(alone), atol=1e-5)

    check(swapped=False)
    with pytest.raises(AssertionError):
        check(swapped=True)


@torch.no_grad()
def test_vectors_of_a_frozen_tower_are_computed_once_and_are_the_same_bits(tmp_path: Path) -> None:  # trap: I13
    setup = setup_of(tmp_path)
    kept = kept_vectors(setup.model)
    kept.entries.clear()  # of rows that were tried packed
    before = kept.computed
    first = logits_at_targets(setup.model, batch_of(setup, 0, 6, 1))
    assert kept.computed == before + 2
    again = logits_at_targets(setup.model, batch_of(setup, 0, 6, 1))
    assert kept.computed == before + 2
    assert torch.equal(first, again)

    setup.model.base_model.multi_modal_projector.requires_grad_(True)
    setup.model.base_model.multi_modal_projector.linear_1.weight.add_(0.1)

    def check() -> None:
        assert not torch.equal(logits_at_targets(setup.model, batch_of(setup, 0, 6, 1)), first)

    check()
    setup.model.base_model.multi_modal_projector.requires_grad_(False)  # as if nobody looked at what is trained
    with pytest.raises(AssertionError):
        check()


@torch.no_grad()
def test_positions_are_not_those_of_the_call_before(tmp_path: Path) -> None:  # trap: I3
    setup = setup_of(tmp_path, "qwen2_5_vl")
    pairs = [logits_at_targets(setup.model, batch_of(setup, row)) for row in (0, 1, 0)]
    assert torch.equal(pairs[0], pairs[2])
    assert setup.model.base_model.rope_deltas is None


def test_no_token_of_an_image_is_learnt(tmp_path: Path) -> None:  # trap: I2
    setup = setup_of(tmp_path)
    token = setup.model.config.image_token_id

    def check(trained: bool) -> None:
        for index in range(len(setup.store)):
            row = setup.store.row(index)
            flags = row.trained | (row.ids == token) if trained else row.trained
            assert (row.ids == token).sum() == 4
            assert not (row.ids[flags] == token).any()

    check(trained=False)
    with pytest.raises(AssertionError):
        check(trained=True)


def test_an_image_is_never_cut(tmp_path: Path) -> None:  # trap: I1
    with pytest.raises(DataError) as refused:
        prepare(vision_recipe(tmp_path, data={"max_tokens": 8, "too_long": "cut"}), root=tmp_path / "runs")
    assert {problem.code for problem in refused.value.problems} <= {"too_long", "no_target"}


def test_a_changed_image_is_another_data_set(tmp_path: Path) -> None:  # trap: I9
    run = stopped(vision_recipe(tmp_path), tmp_path / "runs", at=2)
    first = {file.name: file.read_bytes() for file in (tmp_path / "runs/.rows").iterdir()}
    (tmp_path / "0.png").write_bytes(png(picture(99)))
    with pytest.raises((RunError, DataError)):
        resume(run)
    prepare(recipe_at(tmp_path), root=tmp_path / "runs")
    second = {file.name: file.read_bytes() for file in (tmp_path / "runs/.rows").iterdir()}
    assert first.keys() == second.keys()
    assert first != second


def test_the_same_rows_in_another_folder_have_other_images(tmp_path: Path) -> None:
    """A copy of a file of rows names the images that lie beside the copy."""
    recipe = vision_recipe(tmp_path)
    (tmp_path / "copy").mkdir()
    rows = [*recipe.data.train, DataFile(path=str(questions(tmp_path / "copy")))]
    (tmp_path / "copy/0.png").write_bytes(png(picture(99)))
    assert Path(rows[0].path).read_bytes() == Path(rows[1].path).read_bytes()
    for file in rows:
        data = recipe.data.model_copy(update={"train": (file,)})
        store = prepare(recipe.model_copy(update={"data": data}), root=tmp_path / "runs").rows.store
        assert {Path(image.path).parent for image in store.images or ()} == {Path(file.path).resolve().parent}


def recipe_at(folder: Path) -> Recipe:
    (run,) = runs(folder / "runs")
    given = run.recipe()
    return validate({**given.model_dump(mode="json"), "name": None})


def test_full_tuning_trains_the_language_part_unless_told(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, method={"name": "full"})
    assert all(name.startswith(("model.language_model", "lm_head")) for name in setup.attachment.trained)
    every = setup_of(tmp_path, method={"name": "full", "train": ["language", "projector", "vision"]})
    assert len(every.attachment.trained) == len(list(every.model.parameters()))


def test_vision_and_projector_are_words_of_targets(tmp_path: Path) -> None:  # trap: I6
    setup = setup_of(tmp_path, method={"name": "lora", "targets": ["all-linear"]})

    def check() -> None:
        assert all("language_model" in name for name in setup.attachment.layers)

    check()
    setup = setup_of(tmp_path, method={"name": "lora", "targets": ["all-linear", "vision", "projector"]})
    assert {name.split(".")[1] for name in setup.attachment.layers} == {
        "language_model", "vision_tower", "multi_modal_projector",
    }  # fmt: skip
    assert not any("not run by text" in note for note in setup.attachment.notes)
    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "idefics3", "llava"))]
)
def test_two_prompts_together_are_answered_as_each_alone(family: str, tmp_path: Path) -> None:
    setup = setup_of(tmp_path, family, evaluation={"samples": 3})
    prompts = [(list(sample.ids), sample.images) for sample in setup.samples[:2]]
    prompts[1] = ([*prompts[1][0][:-3], *prompts[1][0][-6:]], prompts[1][1])  # of another length
    alone = [generate(setup.model, setup.renderer, [ids], 6, images=[images]) for ids, images in prompts]
    together = generate(setup.model, setup.renderer, [ids for ids, _ in prompts], 6, images=[i for _, i in prompts])
    assert [answer.text for answer in together] == [answer.text for (answer,) in alone]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "peft", "kind": "IA3"}}, "method.name: peft: not with images"),
        ({"method": "qlora"}, "method.name: qlora: not with images"),
        ({"devices": 2}, "devices, shard: rows with images"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(sections: Any, words: str, tmp_path: Path) -> None:
    given = vision_recipe(tmp_path).model_dump(mode="json")
    with pytest.raises(RecipeError, match=words):
        decide_seeing(Decisions(validate({**given, **sections})), SimpleNamespace(has_images=True))


def test_another_task_has_no_place_for_images(tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        prepare(vision_recipe(tmp_path, task="generate"), root=tmp_path / "runs")
    assert {problem.code for problem in refused.value.problems} == {"no_images_here"}


def test_a_model_that_reads_text_alone_refuses_images(tmp_path: Path) -> None:
    from tiny_run import model_folder

    given = vision_recipe(tmp_path).model_copy(update={"model": str(model_folder(tmp_path / "text"))})
    with pytest.raises(DataError) as refused:
        prepare(given, root=tmp_path / "runs")
    assert {problem.code for problem in refused.value.problems} == {"no_images_here"}


@pytest.mark.slow
def test_two_processes_encode_the_same_rows(tmp_path: Path) -> None:
    stores = [
        prepare(vision_recipe(tmp_path, data={"num_proc": num}), root=tmp_path / f"runs-{num}").store for num in (1, 2)
    ]
    first, second = ([(store.row(i).ids.tolist(), store.row(i).images) for i in range(len(store))] for store in stores)
    assert first == second
    assert stores[0].summary.images == stores[1].summary.images
