"""Padding is told before a run, and is what its steps compute."""

import json

import pytest

from tiny_run import chats, model_folder
from tiny_tasks import padded_folder, task_recipe
from tunesmith.cli.render import plan_facts
from tunesmith.training.loop import training_steps
from tunesmith.training.resolve import resolve_run
from tunesmith.training.setup import prepare
from tunesmith.training.summary import plan_values, resolved_values


def test_padding_is_told_before_and_is_what_the_steps_compute(tmp_path):
    train = {"epochs": 1, "rows_per_step": 4, "tokens_per_pass": 64}
    model = str(padded_folder(tmp_path / "bart"))
    recipe = task_recipe(tmp_path, "summarize", "encoder_decoder", rows=61, dropout=0.0, train=train, model=model)
    foreseen = resolved_values(resolve_run(recipe, root=tmp_path))
    setup = prepare(recipe, root=tmp_path)
    told = plan_values(setup)
    steps = list(training_steps(setup))
    tokens, computed = (sum(event.values[key] for event in steps) for key in ("tokens", "computed"))
    assert foreseen["padding"] == told["padding"] == pytest.approx(1 - tokens / computed, abs=1e-4)
    assert "of what is computed is padding" in dict(plan_facts(foreseen))["work"]


def test_a_machine_reads_the_padding_of_a_plan(tmp_path):
    from typer.testing import CliRunner

    from tunesmith.cli.app import app

    words = ["plan", str(model_folder(tmp_path / "model")), str(chats(tmp_path / "rows.jsonl", 20))]
    words += ["--runs", str(tmp_path / "runs"), "--offline", "--no-probe", "--json", "--set", "precision=float32"]
    assert json.loads(CliRunner().invoke(app, words).stdout)["padding"] == 0.0
