"""`tunesmith selftest` on models of every kind and on runs of every task."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from often import often
from tiny import tiny_tokenizer
from tiny_gguf import write_gguf
from tiny_model import tiny_model
from tiny_run import model_folder
from tiny_tasks import folder_of, task_recipe
from tunesmith.cli.app import app
from tunesmith.recipe.load import validate
from tunesmith.training.selftest import _small, selftest
from tunesmith.training.trainer import train

PROOFS = ("rows do not see each other", "passes do not change the update", "a resumed run is the same run")


def gguf(path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    path.mkdir()
    return write_gguf(path / "model.gguf", tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)


def without_template(path: Path) -> Path:
    folder = model_folder(path)
    (folder / "chat_template.jinja").unlink()
    return folder


MODELS = {
    "causal": model_folder,
    "causal without a template": without_template,
    "gguf": gguf,
    "encoder": lambda path: folder_of("encoder", path, dropout=0.1),
    "encoder_decoder": lambda path: folder_of("encoder_decoder", path, dropout=0.1),
}
USUAL = {"causal": "chat", "gguf": "chat", "encoder": "classify"}


@pytest.mark.parametrize("kind", often(MODELS, "causal", "encoder"))
def test_a_model_of_any_kind_is_tried_with_a_task_that_it_can_learn(tmp_path: Path, kind: str) -> None:
    model = MODELS[kind](tmp_path / "model")
    done = CliRunner().invoke(app, ["selftest", str(model), "--offline", "--runs", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert all(f"✓ {proof}" in done.output for proof in PROOFS)
    assert _small(validate({"model": str(model)}), tmp_path, offline=True).task == USUAL.get(kind, "generate")


@pytest.mark.parametrize(("kind", "task"), often([("encoder", "tag"), ("causal", "classify")], "encoder"))
def test_the_task_that_is_set_counts(tmp_path: Path, kind: str, task: str) -> None:
    model = MODELS[kind](tmp_path / "model")
    proofs = list(selftest(validate({"model": str(model), "task": task}), offline=True))
    assert {proof.name for proof in proofs} >= set(PROOFS)
    assert all(proof.passed for proof in proofs), proofs


def test_a_run_is_tried_with_its_own_rows(tmp_path: Path) -> None:
    run = train(task_recipe(tmp_path, "generate", "encoder_decoder"), root=tmp_path / "runs")
    done = CliRunner().invoke(app, ["selftest", str(run.path), "--offline"])
    assert done.exit_code == 0, done.output
    assert done.output.count("✓") >= len(PROOFS)
