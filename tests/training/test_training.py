"""Real rows through every task, method and layout on a two-layer model, from file to report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from often import slow
from tiny_model import tiny_model
from tiny_run import chats, tiny_recipe, values_of
from tunesmith.data.collate import build_batch
from tunesmith.errors import DataError, ModelError
from tunesmith.inference.load import load_run
from tunesmith.models.modes import eval_mode
from tunesmith.planning.defaults import Facts
from tunesmith.recipe.schema import Train
from tunesmith.runs.folder import Run, runs
from tunesmith.training.resolve import notes_on_repeats
from tunesmith.training.setup import prepare
from tunesmith.training.trainer import train

FULL = {"name": "full"}


def pairs(path: Path, num: int = 18) -> Path:
    rows = [{"prompt": f"the quick fox {i}", "completion": f" jumps over dog {i % 3}"} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe_of(folder: Path, *, arch="llama", method="lora", task="chat", precision="float32", **sections):
    recipe = tiny_recipe(folder, arch=arch, precision=precision, **sections)
    changes: dict = {"task": task}
    if method == "full":
        from tunesmith.recipe.methods import FullMethod

        changes["method"] = FullMethod()
    if task == "generate":
        files = (recipe.data.train[0].model_copy(update={"path": str(pairs(folder / "pairs.jsonl"))}),)
        changes["data"] = recipe.data.model_copy(update={"train": files})
    return recipe.model_copy(update=changes)


def report_of(run: Run) -> dict:
    return json.loads(run.report_path.read_text())


@pytest.mark.parametrize(
    ("rows", "steps", "note"),
    [
        (1, 100, "1 training row is learnt 100 times in 100 steps"),
        (12, 60, "12 training rows are learnt 20 times in 60 steps"),
        (12, 40, None),
        (20, 400, None),
    ],
)
def test_few_rows_that_are_learnt_very_often_are_noted(rows: int, steps: int, note: str | None) -> None:
    options = Train(rows_per_step=4, epochs=400, max_steps=steps)
    notes = notes_on_repeats(options, Facts(1, "cpu", "causal", np.full(rows, 50, np.int32)))
    assert [text.partition(":")[0] for text in notes] == ([] if note is None else [note])


@pytest.mark.parametrize(
    ("arch", "precision", "method", "task"),
    [
        ("llama", "float32", "lora", "chat"),
        slow(("llama", "bfloat16", "lora", "generate")),
        ("llama", "bfloat16", "full", "chat"),
        ("gpt2", "float32", "full", "generate"),
        slow(("bloom", "float32", "lora", "chat")),
    ],
)
def test_a_run_lowers_the_loss_on_rows_it_never_saw(tmp_path, task, method, arch, precision):
    run = train(recipe_of(tmp_path, arch=arch, method=method, task=task, precision=precision), root=tmp_path / "runs")
    report = report_of(run)
    assert run.state() == "done"
    assert report["metrics"]["after"]["loss"] < report["metrics"]["before"]["loss"]
    assert report["task"] == task
    assert report["method"] == method
    assert report["rows"] == {
        "train": report["rows"]["train"],
        "held_out": report["rows"]["held_out"],
        "skipped": 0,
        "overlap": 0,
    }
    assert report["steps"] == max(event.step for event in run.events())
    assert report["tokens"]["processed"] > report["tokens"]["trained"] > 0
    assert set(report["seconds"]) == {"prepare", "train", "evaluate"}
    assert len(report["samples"]) == 2
    assert {"prompt", "reference", "before", "after"} <= set(report["samples"][0])
    assert report["peak_memory_bytes"] > 0
    assert report["tokens_per_second"] > 0


def test_a_model_that_cannot_be_packed_is_padded_and_it_is_said(tmp_path):
    setup = prepare(recipe_of(tmp_path, arch="bloom"), root=tmp_path)
    assert setup.sampler.layout == "padded"
    assert any("padded" in note for note in setup.notes)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_loaded_result_scores_what_the_report_says(tmp_path, method):
    recipe = recipe_of(tmp_path, method=method)
    run = train(recipe, root=tmp_path / "runs")
    speaker = load_run(run)
    setup = prepare(run.recipe(), root=tmp_path)
    store, rows = setup.rows.held_store, [int(i) for i in setup.rows.held_rows]
    batch = build_batch([store.row(i) for i in rows], rows, layout="padded", device="cpu")
    with eval_mode(speaker.model):
        measured = setup.task.measure(speaker.model, batch)  # by the output layer of the model that is measured
    # 1e-5: float32, padded by transformers' own attention here and packed there
    loss = float(measured.losses_N.double().mean())
    assert loss == pytest.approx(report_of(run)["metrics"]["after"]["loss"], rel=1e-5)


def test_the_same_recipe_gives_the_same_numbers_wherever_rows_are_cached(tmp_path):
    recipe = recipe_of(tmp_path)
    first = train(recipe, root=tmp_path / "a")
    again = train(recipe, root=tmp_path / "a")
    elsewhere = train(recipe, root=tmp_path / "b")
    assert values_of(first.events()) == values_of(again.events()) == values_of(elsewhere.events())


def test_checkpointed_layers_change_memory_not_numbers(tmp_path):
    losses = []
    for layers in (0, 1):
        recipe = recipe_of(tmp_path, train={"checkpointed_layers": layers, "max_steps": 4})
        run = train(recipe, root=tmp_path / f"runs{layers}")
        losses.append([event.values["loss"] for event in run.events() if event.kind == "step"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_one_row_can_be_trained_on_and_nothing_is_measured(tmp_path):
    run = train(tiny_recipe(tmp_path, rows=1), root=tmp_path / "runs")
    report = report_of(run)
    assert report["metrics"] == {"before": None, "after": None}
    assert report["rows"]["held_out"] == 0
    assert any("held out" in note for note in report["notes"])


def test_bad_rows_refuse_the_data_or_are_skipped_and_listed(tmp_path):
    recipe = recipe_of(tmp_path)
    path = Path(recipe.data.train[0].path)
    path.write_text(path.read_text() + '{"messages": [{"role": "user", "content": "no answer"}]}\n{"broken\n')
    with pytest.raises(DataError) as refusal:
        train(recipe, root=tmp_path / "runs")
    assert {problem.source.line for problem in refusal.value.problems} == {19, 20}
    assert "data.bad_rows=skip" in str(refusal.value)
    assert runs(tmp_path / "runs") == []
    skip = recipe.model_copy(update={"data": recipe.data.model_copy(update={"bad_rows": "skip"})})
    run = train(skip, root=tmp_path / "runs")
    assert report_of(run)["rows"]["skipped"] == 2
    listed = [json.loads(line) for line in (run.rows_path / "problems.jsonl").read_text().splitlines()]
    assert {problem["source"] for problem in listed} == {f"{path}:19", f"{path}:20"}


def test_skipping_is_not_offered_where_no_row_is_left(tmp_path):
    recipe = recipe_of(tmp_path)
    Path(recipe.data.train[0].path).write_text('{"prompt": "", "completion": ""}\n' * 2)
    with pytest.raises(DataError, match=r"rows unusable\. Correct the data: no row is left without them\.$"):
        train(recipe, root=tmp_path / "runs")


def test_held_out_rows_stay_held_out_when_rows_are_added(tmp_path):
    def held(recipe) -> set[int]:
        rows = prepare(recipe, root=tmp_path).rows
        return {int(rows.store.hashes[i]) for i in rows.held_rows}

    recipe = recipe_of(tmp_path, rows=40)
    before = held(recipe)
    path = Path(recipe.data.train[0].path)
    path.write_text(chats(tmp_path / "more.jsonl", 30, seed=9).read_text() + path.read_text())
    assert before
    assert before <= held(recipe)


def test_rows_longer_than_the_models_attention_are_refused_before_loading(tmp_path):
    recipe = recipe_of(tmp_path, data={"max_tokens": 100_000})
    with pytest.raises(ModelError, match=r"data\.max_tokens is 100,000"):
        prepare(recipe, root=tmp_path)


def test_bfloat16_full_tuning_moves_weights_that_rounding_would_not(tmp_path):  # trap: L9
    recipe = recipe_of(tmp_path, method="full", precision="bfloat16", optim={"lr": 1e-5}, train={"max_steps": 4})
    setup = prepare(recipe, root=tmp_path)
    from tunesmith.training.loop import training_steps

    before = {name: tensor.detach().clone() for name, tensor in setup.attachment.trained.items()}
    list(training_steps(setup))
    moved = [
        float((tensor != before[name]).float().mean())
        for name, tensor in setup.attachment.trained.items()
        if "layers" in name and tensor.ndim > 1
    ]
    assert min(moved) >= 0.99
    assert all(tensor.dtype == torch.float32 for tensor in setup.attachment.trained.values())


def test_the_best_checkpoint_is_kept_although_none_was_due(tmp_path):  # trap: R6
    sections = {"evaluation": {"every": 3}, "checkpoint": {"every": 100, "keep": 1}, "optim": {"lr": 0.3}}
    run = train(recipe_of(tmp_path, train={"max_steps": 8}, **sections), root=tmp_path / "runs")
    losses = {e.step: e.values["loss"] for e in run.events() if e.kind == "evaluation" and e.values["name"] == "step"}
    best = min(losses, key=losses.__getitem__)
    assert report_of(run)["best"]["step"] in {best, 8}
    assert (run.checkpoints_path / f"step-{best}").is_dir()


def with_rows(recipe, path: Path, rows: list[dict], **weights):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (recipe.data.train[0].model_copy(update={"path": str(path), **weights}),)
    return recipe.model_copy(update={"task": "auto", "data": recipe.data.model_copy(update={"train": files})})


def test_pairs_of_messages_are_chats_and_pairs_of_text_are_not(tmp_path):
    turns = [
        {"prompt": [{"role": "user", "content": f"hello {i}"}], "completion": [{"role": "assistant", "content": "yes"}]}
        for i in range(12)
    ]
    chat = prepare(with_rows(tiny_recipe(tmp_path), tmp_path / "turns.jsonl", turns), root=tmp_path)
    assert chat.task.name == "chat"
    assert "<|im_start|>" in chat.renderer.tokenizer.decode(chat.rows.store.row(0).ids)
    text = [{"prompt": f"hello {i}", "completion": " yes"} for i in range(12)]
    plain = prepare(with_rows(tiny_recipe(tmp_path), tmp_path / "text.jsonl", text), root=tmp_path)
    assert plain.task.name == "generate"
    with pytest.raises(DataError) as refusal:
        prepare(chat.recipe.model_copy(update={"task": "generate"}), root=tmp_path)
    assert {problem.code for problem in refusal.value.problems} == {"not_a_pair"}


def test_a_weight_that_rounds_to_no_row_still_takes_one(tmp_path):
    rows = [json.loads(line) for line in chats(tmp_path / "few.jsonl", 4).read_text().splitlines()]
    setup = prepare(with_rows(tiny_recipe(tmp_path), tmp_path / "few.jsonl", rows, weight=0.1), root=tmp_path)
    assert setup.sampler.rows_per_epoch == 1
    assert setup.total_steps >= 1


def test_prompts_that_leave_no_room_for_an_answer_are_left_out_and_counted(tmp_path):
    recipe = tiny_recipe(tmp_path, arch="gpt2", evaluation={"samples": 3, "sample_tokens": 500})
    setup = prepare(recipe, root=tmp_path)  # the model has 512 positions
    assert setup.samples == []
    num = min(3, len(setup.rows.held_rows))
    assert f"{num} held-out rows have no prompt to answer: empty or too long" in setup.notes


def test_whatever_ends_a_run_is_the_last_line_of_its_log(tmp_path, monkeypatch):
    def broken(*args):
        raise MemoryError("no more")

    monkeypatch.setattr("tunesmith.training.trainer._take_steps", broken)
    with pytest.raises(MemoryError):
        train(recipe_of(tmp_path), root=tmp_path / "runs")
    run = runs(tmp_path / "runs")[0]
    assert run.state() == "failed"
    assert list(run.events())[-1].values["code"] == "MemoryError"


def test_a_result_that_cannot_be_saved_is_known_before_the_first_step(tmp_path, monkeypatch):
    def refuses(*args):
        raise ModelError("cannot be saved")

    monkeypatch.setattr("tunesmith.training.setup.Setup.save_result", refuses)
    with pytest.raises(ModelError):
        train(recipe_of(tmp_path), root=tmp_path / "runs")
    assert max(event.step for event in runs(tmp_path / "runs")[0].events()) == 0


def test_a_device_without_float64_is_trained_and_measured_on(tmp_path, monkeypatch):
    """As Apple's MPS: what is to be float64 is brought to the processor first."""
    to_cpu, to_double = torch.Tensor.cpu, torch.Tensor.double

    def brought(tensor, *how):
        found = to_cpu(tensor, *how)
        found.is_here = True
        return found

    def widened(tensor, *how):
        assert getattr(tensor, "is_here", False), "MPS has no float64"
        return to_double(tensor, *how)

    monkeypatch.setattr(torch.Tensor, "cpu", brought)
    monkeypatch.setattr(torch.Tensor, "double", widened)
    run = train(recipe_of(tmp_path), root=tmp_path / "runs")
    assert run.state() == "done"


def test_rows_with_a_token_that_the_model_has_no_vector_for_are_refused(tmp_path):
    recipe = recipe_of(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)
    tokenizer.add_tokens(["tallest"])
    tokenizer.save_pretrained(recipe.model)
    with pytest.raises(ModelError, match=r"the token 'tallest' \(\d+\) has no vector, for .* has \d+ rows"):
        train(recipe, root=tmp_path / "runs")
    assert runs(tmp_path / "runs") == []


def test_what_never_got_a_gradient_is_said(tmp_path):
    """Mamba reads the weight of a layer without calling it, so that its adapter is never used."""
    recipe = tiny_recipe(tmp_path, train={"max_steps": 1})
    said = [event.values["text"] for event in train(recipe, root=tmp_path / "a").events() if event.kind == "note"]
    assert not any("gradient" in text for text in said)
    tiny_model("falcon_mamba", vocab_size=512, state_size=8).save_pretrained(recipe.model)
    said = [event.values["text"] for event in train(recipe, root=tmp_path / "b").events() if event.kind == "note"]
    assert any(
        "4 trained weights never got a gradient, such as backbone.layers.0.mixer.dt_proj" in text for text in said
    )
