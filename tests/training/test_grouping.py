"""`train.group_by_length` in a run: told, the same targets and losses in an epoch, and resumed in the same order."""

import json

import pytest
import torch

from tiny_run import model_folder, tiny_recipe, values_of
from tiny_tasks import padded_folder, task_recipe
from tunesmith.cli.render import plan_facts
from tunesmith.errors import RunError, Stopped
from tunesmith.runs.folder import Run, runs
from tunesmith.training.loop import training_steps
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import Setup, prepare
from tunesmith.training.summary import plan_values, resolved_values
from tunesmith.training.trainer import Listener, resume, train

GROUPING = "train.group_by_length"


def recipe_of(folder, **settings):
    train_options = {"epochs": 2, "rows_per_step": 4, "tokens_per_pass": 64, "group_by_length": True, **settings}
    model = str(padded_folder(folder / "bart"))
    return task_recipe(folder, "summarize", "encoder_decoder", rows=61, dropout=0.0, train=train_options, model=model)


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_by_itself_a_step_is_a_random_sample_also_where_rows_are_padded(tmp_path, arch):
    setup = prepare(tiny_recipe(tmp_path, arch=arch), root=tmp_path)
    assert not setup.sampler.groups_by_length
    assert setup.recipe.train.group_by_length is False


def test_what_a_person_says_holds(tmp_path):
    assert prepare(recipe_of(tmp_path), root=tmp_path).sampler.groups_by_length


def test_padding_is_told_before_and_is_what_the_steps_compute(tmp_path):
    recipe = recipe_of(tmp_path, epochs=1)
    foreseen = resolved_values(resolve_run(recipe, root=tmp_path))
    setup = prepare(recipe, root=tmp_path)
    told = plan_values(setup)
    steps = list(training_steps(setup))
    tokens, computed = (sum(event.values[key] for event in steps) for key in ("tokens", "computed"))
    assert foreseen["padding"] == told["padding"] == pytest.approx(1 - tokens / computed, abs=1e-4)
    assert foreseen["recipe"]["train"]["group_by_length"] is True
    assert "of what is computed is padding" in dict(plan_facts(foreseen))["work"]
    random = prepare(recipe_of(tmp_path, group_by_length=False), root=tmp_path)
    assert told["padding"] < plan_values(random)["padding"]


def epoch_losses(setup: Setup) -> tuple[float, float]:
    """(loss, targets) of an epoch of the untouched model."""
    passes = [rows for step in range(1, setup.sampler.steps_per_epoch + 1) for rows in setup.sampler.step(step)]
    with torch.no_grad():
        losses = [setup.task.loss_sum(setup.model, setup.collator.batch(rows, draw=1)) for rows in passes]
    return float(sum(losses)), float(sum(setup.rows.store.denominators[i] for rows in passes for i in rows))


def test_an_epoch_has_the_same_targets_and_the_same_loss(tmp_path):
    grouped, random = (
        epoch_losses(prepare(recipe_of(tmp_path, group_by_length=way), root=tmp_path)) for way in (True, False)
    )
    assert grouped[1] == random[1]
    assert grouped[0] == pytest.approx(random[0], rel=1e-5)  # float32, other passes


def stopped(recipe, root, step: int) -> Run:
    seen = {"step": 0}

    def on_event(event) -> None:
        seen["step"] = max(seen["step"], event.step)

    with pytest.raises(Stopped):
        train(recipe, root=root, listener=Listener(on_event=on_event, should_stop=lambda: seen["step"] >= step))
    return runs(root)[0]


def test_stopped_and_resumed_is_the_same_run(tmp_path):  # trap: R1
    straight = train(recipe_of(tmp_path), root=tmp_path / "straight")
    run = resume(stopped(recipe_of(tmp_path), tmp_path / "stopped", 17))  # 16 steps are an epoch
    assert values_of(run.events()) == values_of(straight.events())


def of_before(folder, monkeypatch) -> Run:
    """A run of a version that had no such option, stopped."""
    from tunesmith.training import setup as preparing

    right = preparing._identity
    with monkeypatch.context() as patch:
        patch.setattr(
            preparing,
            "_identity",
            lambda *args: {key: value for key, value in right(*args).items() if key != f"setting {GROUPING}"},
        )
        run = stopped(recipe_of(folder, group_by_length=False), folder / "runs", 5)
    lines = run.recipe_path.read_text("utf-8").splitlines(keepends=True)
    run.recipe_path.write_text("".join(line for line in lines if "group_by_length" not in line), "utf-8")
    return run


def test_a_run_of_before_goes_on_in_its_order_alone_and_says_so(tmp_path, monkeypatch):
    run = of_before(tmp_path, monkeypatch)
    recipe = run.recipe_path.read_text("utf-8")
    run.recipe_path.write_text(recipe.replace("\ntrain:\n", "\ntrain:\n  group_by_length: true\n"), "utf-8")
    with pytest.raises(RunError, match=f"{GROUPING} was False, is True"):
        resume(run)
    run.recipe_path.write_text(recipe, "utf-8")
    straight = train(recipe_of(tmp_path, group_by_length=False), root=tmp_path / "straight")
    rows = [[event.values["rows"] for event in one.events() if event.kind == "step"] for one in (resume(run), straight)]
    assert rows[0] == rows[1]
    notes = [event.values["text"] for event in run.events() if event.kind == "note"]
    assert notes == [f"setting {GROUPING}: False, as when this run began"]


def test_a_machine_reads_the_padding_of_a_plan(tmp_path):
    from typer.testing import CliRunner

    from tiny_run import chats
    from tunesmith.cli.app import app

    words = ["plan", str(model_folder(tmp_path / "model")), str(chats(tmp_path / "rows.jsonl", 20))]
    words += ["--runs", str(tmp_path / "runs"), "--offline", "--no-probe", "--json", "--set", "precision=float32"]
    told = json.loads(CliRunner().invoke(app, words).stdout)
    assert told["padding"] == 0.0
    assert told["recipe"]["train"]["group_by_length"] is False
