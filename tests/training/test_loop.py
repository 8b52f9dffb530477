"""The loop: equal to forty plain lines, stops before a bad update, and nothing between steps can disturb it."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tiny_run import tiny_recipe
from tunesmith.data.collate import build_batch
from tunesmith.errors import NonFiniteError
from tunesmith.evaluation.predict_rows import predict_rows
from tunesmith.generation.padded import generate
from tunesmith.runs import checkpoint
from tunesmith.runs.folder import runs
from tunesmith.training.loop import training_steps
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.trainer import train
from tunesmith.types import Batch, LossSum

ROOT = Path(__file__).parents[2]


def flat_loop():
    spec = importlib.util.spec_from_file_location("flat_loop", ROOT / "examples" / "flat_loop.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat_losses(setup: Setup, folder: Path, total: int) -> list[float]:
    """The losses of examples/flat_loop.py on the rows, order and first adapter weights of `setup`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flat = flat_loop()
    flat.RANK, flat.ALPHA = setup.recipe.method.rank, setup.recipe.method.alpha
    flat.LR, flat.WARMUP = setup.recipe.optim.lr, setup.recipe.optim.warmup
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with open(setup.recipe.data.train[0].path, encoding="utf-8") as lines:
        rows = [flat.encode(tokenizer, json.loads(line)) for line in lines]
    first = {name: tensor.detach().clone() for name, tensor in setup.attachment.trained.items()}
    parameters = flat.adapt(model, lambda name, n: first[f"{name}.lora_A.weight"])
    by_line = {int(setup.rows.store.lines[i]) - 1: i for i in range(len(setup.rows.store))}
    line_of = {i: line for line, i in by_line.items()}
    order = [[line_of[i] for rows in setup.sampler.step(k) for i in rows] for k in range(1, total + 1)]
    return list(flat.train(model, parameters, rows, lambda step: order[step - 1], total))


def losses_agree(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == 20
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-5


@pytest.fixture
def twenty_steps(tmp_path) -> Setup:
    train = {"epochs": 4, "rows_per_step": 4, "max_steps": 20, "tokens_per_pass": 96}
    setup = prepare(tiny_recipe(tmp_path, rows=24, train=train), root=tmp_path)
    assert setup.total_steps == 20
    return setup


def test_twenty_losses_equal_the_flat_loop(twenty_steps, tmp_path):
    theirs = flat_losses(twenty_steps, tmp_path / "model-llama", 20)
    losses_agree([event.values["loss"] for event in training_steps(twenty_steps)], theirs)


@pytest.mark.slow
def test_flat_loop_test_catches_a_rate_that_is_one_step_late(twenty_steps, tmp_path, monkeypatch):  # trap: L12 planted
    from tunesmith.training import loop

    theirs = flat_losses(twenty_steps, tmp_path / "model-llama", 20)
    right = loop.rate
    monkeypatch.setattr(loop, "rate", lambda step, total, optim: right(max(1, step - 1), total, optim))
    with pytest.raises(AssertionError):
        losses_agree([event.values["loss"] for event in training_steps(twenty_steps)], theirs)


@pytest.mark.slow
def test_flat_loop_test_catches_a_mean_of_means(twenty_steps, tmp_path, monkeypatch):  # trap: L1 planted
    theirs = flat_losses(twenty_steps, tmp_path / "model-llama", 20)
    plan = replace(twenty_steps.sampler, tokens_per_pass=40)
    mean = replace(
        twenty_steps.task,
        loss_sum=lambda model, batch: twenty_steps.task.loss_sum(model, batch) / batch.num_targets * 20,
    )
    with pytest.raises(AssertionError):
        losses_agree([e.values["loss"] for e in training_steps(replace(twenty_steps, sampler=plan, task=mean))], theirs)


def every_step_is_divided_by_its_own_targets(setup: Setup, loss_sum) -> None:
    """The loss of every step, the last and smaller one too, is the mean over just its own targets."""
    store, task = setup.rows.store, setup.task
    expected = []
    for step in range(1, setup.total_steps + 1):  # a rate of almost zero: the weights stay where they are
        rows = [i for members in setup.sampler.step(step) for i in members]
        batch = build_batch([store.row(i) for i in rows], rows, layout="packed", device="cpu")
        expected.append(float(task.loss_sum(setup.model, batch).detach()) / int(store.targets[rows].sum()))
    found = [e.values["loss"] for e in training_steps(replace(setup, task=replace(task, loss_sum=loss_sum)))]
    assert found == pytest.approx(expected, rel=1e-5)


def partial(tmp_path) -> Setup:
    train = {"epochs": 1, "rows_per_step": 4}
    setup = prepare(tiny_recipe(tmp_path, rows=16, optim={"lr": 1e-12}, train=train), root=tmp_path)
    assert len(setup.rows.train_rows) % 4
    assert setup.total_steps == len(setup.rows.train_rows) // 4 + 1
    return setup


def test_the_last_partial_step_is_divided_by_its_own_targets(tmp_path):  # trap: L2
    setup = partial(tmp_path)
    every_step_is_divided_by_its_own_targets(setup, setup.task.loss_sum)


@pytest.mark.slow
def test_partial_step_test_catches_the_divisor_of_a_full_step(tmp_path):  # trap: L2 planted
    setup = partial(tmp_path)

    def as_if_full(model, batch):
        return setup.task.loss_sum(model, batch) * len(batch.lengths) / setup.sampler.rows_per_step

    with pytest.raises(AssertionError):
        every_step_is_divided_by_its_own_targets(setup, as_if_full)


def nan_stops_before_the_update(recipe, root: Path, at: int) -> None:
    """A loss that is not a number at step `at`: the run fails by name, weights and checkpoints are those before."""
    with pytest.raises(NonFiniteError, match=rf"step {at}: .*chats\.jsonl:\d+"):
        train(recipe, root=root)
    run = runs(root)[0]
    assert run.state() == "failed"
    events = list(run.events())
    assert events[-1].values["code"] == "NonFiniteError"
    assert max(event.step for event in events if event.kind == "step") == at - 1
    newest = checkpoint.newest(run.checkpoints_path, lambda path, why: None)
    assert newest.step < at
    assert all(tensor.isfinite().all() for tensor in newest.weights.values())


def poison(monkeypatch, at: int) -> None:
    from tunesmith.tasks import TASKS

    chat = TASKS["chat"]
    calls = {"n": 0}

    def poisoned(terms):
        losses = chat.losses(terms)

        def loss_sum(model, batch):
            loss = losses.loss_sum(model, batch)
            calls["n"] += 1
            return loss * float("nan") if calls["n"] == at else loss

        return replace(losses, loss_sum=loss_sum)

    monkeypatch.setitem(TASKS, "chat", replace(chat, losses=poisoned))


def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path, monkeypatch):  # trap: L8
    recipe = tiny_recipe(tmp_path, train={"tokens_per_pass": 4096}, checkpoint={"every": 1})
    poison(monkeypatch, at=5)
    nan_stops_before_the_update(recipe, tmp_path / "runs", at=5)


@pytest.mark.slow
def test_nan_test_catches_a_loop_that_goes_on(tmp_path, monkeypatch):  # trap: L8 planted
    recipe = tiny_recipe(tmp_path, train={"tokens_per_pass": 4096}, checkpoint={"every": 1})
    poison(monkeypatch, at=5)
    monkeypatch.setattr("tunesmith.training.loop._require_finite", lambda *args, **kwargs: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        nan_stops_before_the_update(recipe, tmp_path / "runs", at=5)


def looking_changes_nothing(recipe, root: Path) -> None:
    """Weights after every step are the same bits whether or not the run is measured and sampled in between."""
    quiet = prepare(recipe, root=root)
    quiet_weights = [snapshot(quiet) for _ in training_steps(quiet)]
    watched = prepare(recipe, root=root)
    for event, expected in zip(training_steps(watched), quiet_weights, strict=True):
        look(watched)
        weights = snapshot(watched)
        assert all(torch.equal(weights[name], expected[name]) for name in expected), event.step


def snapshot(setup: Setup) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in setup.attachment.trained.items()}


def look(setup: Setup) -> None:
    rows = [int(i) for i in setup.rows.held_rows]
    predict_rows(setup.model, setup.task, setup.held_collator, rows, tokens_per_pass=64)
    generate(setup.model, setup.renderer, [s.ids for s in setup.samples], 2)
    torch.rand(1)  # as something that draws


def test_measuring_and_sampling_change_no_weight(tmp_path):  # trap: L11
    looking_changes_nothing(tiny_recipe(tmp_path, dropout=0.5, train={"max_steps": 3}), tmp_path)


@pytest.mark.slow
def test_looking_test_catches_random_numbers_shared_with_sampling(tmp_path, monkeypatch):  # trap: L11 planted
    monkeypatch.setattr("tunesmith.training.step.torch.manual_seed", lambda seed: None)
    with pytest.raises(AssertionError):
        looking_changes_nothing(tiny_recipe(tmp_path, dropout=0.5, train={"max_steps": 3}), tmp_path)


def test_breaking_off_leaves_the_model_whole(twenty_steps):
    for event in training_steps(twenty_steps):
        if event.step == 2:
            break
    weights = snapshot(twenty_steps)
    assert all(tensor.isfinite().all() for tensor in weights.values())
    following = next(iter(training_steps(twenty_steps, start=2)))
    assert following.step == 3


def test_a_loss_from_outside_takes_the_place_of_the_task_s(tmp_path: Path) -> None:
    from torch.nn import functional as F

    from tunesmith.models.forward import logits_at_targets

    def spelled_out(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(logits_at_targets(model, batch), batch.targets_N, reduction="sum")

    def losses(loss: LossSum | None) -> list[float]:
        setup = prepare(tiny_recipe(tmp_path, train={"max_steps": 3, "tokens_per_pass": 40}), root=tmp_path)
        return [event.values["loss"] for event in training_steps(setup, loss=loss)]

    own = losses(None)
    assert losses(spelled_out) == pytest.approx(own, abs=1e-6)
    assert losses(lambda model, batch: 2 * spelled_out(model, batch))[0] == pytest.approx(2 * own[0], abs=1e-6)
