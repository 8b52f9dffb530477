"""Every command that would render a chat template of somebody else refuses one that never ends, in a moment."""

import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.hostile_templates import NESTED
from tiny import CHATML
from tiny_run import tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import ModelError
from tunesmith.runs.folder import Run
from tunesmith.serve.protocol import EngineOptions
from tunesmith.serve.registry import open_registry
from tunesmith.training.trainer import train

HOSTILE = "{% if tools %}" + NESTED + "{% if n.a == n.b %}{% endif %}{% endif %}" + CHATML
"""Deaf to Ctrl-C and SIGTERM, in one comparison of 2**60 lists."""
SAYS = "its chat template makes a list or an object of more than 1,000,000 values"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with such a template, and a run whose adapter folder has one."""
    folder = tmp_path_factory.mktemp("hostile")
    recipe = tiny_recipe(folder, train={"max_steps": 1}, evaluation={"samples": 0})
    run = train(recipe, root=folder / "runs", out=folder / "runs" / "run", offline=True)
    (folder / "template.jinja").write_text(HOSTILE)
    (run.adapter_path / "chat_template.jinja").write_text(HOSTILE)
    (run.path / "result.json").unlink()  # its hashes are of the file before; who makes a run writes them anew
    shutil.copytree(folder / "model-llama", folder / "bad")
    (folder / "bad" / "chat_template.jinja").write_text(HOSTILE)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "check chats.jsonl --model bad",
        "plan bad chats.jsonl",
        "train bad chats.jsonl",
        "train model-llama chats.jsonl --set data.template=template.jinja",
        "eval bad chats.jsonl",
        "predict bad chats.jsonl",
        "chat bad",
        "selftest bad",
        "eval runs/run chats.jsonl",
        "predict runs/run chats.jsonl",
        "chat runs/run",
        "export runs/run --to merged",
    ],
)
def test_a_command_refuses_it(place: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    started = time.monotonic()
    done = CliRunner().invoke(app, [word.replace("--device cpu", "") for word in words.split()])
    assert SAYS in " ".join((done.output + done.stderr).split()), done.output
    assert done.exit_code in (1, 2)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", ["run", "bad"])
def test_an_engine_does_not_start_with_it(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ModelError, match=SAYS):
        open_registry([name], root=place / "runs", options=EngineOptions(offline=True), note=lambda text: None)
    assert Run(place / "runs" / "run").state() == "done"
