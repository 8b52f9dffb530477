"""Wrong words are refused before torch is imported or a model is read; and the run that `last` means is named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.fake_runs import fake_run
from tunesmith.cli.app import app
from tunesmith.runs.folder import Run
from tunesmith.types import Event

CASES = [
    (["train", "model", "rows.jsonl", "--set", "device=tpu"], "device: tpu: not a device"),
    (["train", "model", "rows.jsonl", "--grader", "graderr.py"], "graderr.py: there is no such file. Did you mean "),
    (["plan", "model", "rows.jsonl", "--set", "reinforce.grader=no.json"], "no.json: there is no such file"),
    (["grade", "rows.jsonl", "--grader", "graderr.py"], "graderr.py: there is no such file. Did you mean "),
    (["train", "model", "rows.jsonl", "--grader", "run:nowhere"], "nowhere: no such run in runs"),
    (["train", "model", "rows.jsonl", "--task", "distil", "--teacher", "no.gguf"], "no.gguf: no such folder or file"),
    (["train", "./nowhere", "rows.jsonl"], "./nowhere: no such folder or file"),
    (["train", "model", "rows.jsonl", "--export", "coreml"], "coreml: there is no such target"),
    (["export", "one", "--to", "coreml"], "--to: coreml: there is no such target"),
    (["export", "nowhere", "--to", "gguf"], "nowhere: no such run in runs"),
    (["export", "two", "--to", "gguf"], "runs/two: no result yet, so nothing to export"),
    (["eval", "./nowhere", "rows.jsonl"], "./nowhere: no such folder or file"),
    (["chat", "runs/nowhere"], "runs/nowhere: no such folder or file"),
    (["compare", "one", "two", "--out", "a.svg"], "--out a.svg: has to be FILE.html in a folder that exists"),
    (["compare", "one", "two", "--out", "no/a.html"], "--out no/a.html: has to be FILE.html in a folder that exists"),
    (["eval", "one", "wrong.jsonl"], "wrong.jsonl: no row of it can be used"),
    (["eval", "exp 1", "wrong.jsonl"], "wrong.jsonl: no row of it can be used"),
    (["eval", "_ä", "wrong.jsonl"], "wrong.jsonl: no row of it can be used"),
    (["compare", "one", "two", "--data", "wrong.jsonl"], "wrong.jsonl: no row of it can be used"),
    (
        ["train", "rows.jsonl", "model"],
        "a data file, and the model comes first. Write: tunesmith train model rows",
    ),
    (
        ["plan", "rows.jsonl"],
        "a data file, and the model comes first. Write: tunesmith plan MODEL rows",
    ),
    (["train", "modle", "rows.jsonl"], "modle: no such folder, file or run. Did you mean model?"),
    (["chat", "onne"], "onne: no such folder, file or run. Did you mean one? For a model of the hub write hf://onne"),
    (["chat", "zebra", "--offline"], "zebra: no such run in runs"),
    (["predict", "twoo", "rows.jsonl"], "twoo: no such folder, file or run. Did you mean two?"),
    (["eval", "modle", "rows.jsonl"], "Did you mean model?"),
    (
        ["train", "model", "rows.jsonl", "--method", "peft", "--set", "method.kind=ia3"],
        "peft: needs the package peft, which is not installed",
    ),
    (["train", "model", "rows.jsonl", "--method", "qlora"], "needs the package bitsandbytes, which is not installed"),
    (["export", "one", "--to", "onnx"], "--to: onnx: onnxscript and onnxruntime are not installed. `"),
    (["train", "model", "rows.jsonl", "--export", "onnx"], "export.to: onnx: onnxscript and onnxruntime are not"),
    (["export", "one", "--to", "gguff"], "there is no such target. Did you mean gguf?"),
    (["finetune", "model", "rows.jsonl"], "No such command 'finetune'. Did you mean train?"),
    (["exprot", "one"], "No such command 'exprot'. Did you mean export?"),
    (["version"], "No such command 'version'. Did you mean --version?"),
    (["train", "model", "rows.jsonl", "--out", "runs/one"], "runs/one: already exists, and a run never overwrites"),
    (["resume", "one"], "this run is done: nothing is left to resume"),
    (["serve", "onne", "--port", "0"], "onne: no such folder, file or run. Did you mean one?"),
    (["serve", "zebra", "--offline", "--port", "0"], "zebra: no such run in runs"),
    (["serve", "--jobs"], "name the model that jobs tune, `tunesmith serve --jobs MODEL`"),
]
CODE = """
import sys
from typer.testing import CliRunner
from tunesmith.cli import options
from tunesmith.cli.app import app

MISSING = ("peft", "bitsandbytes", "onnxscript", "onnxruntime")
options.find_spec = lambda name: None if name in MISSING else name
for words, says in {cases}:
    result = CliRunner().invoke(app, words, env={{"COLUMNS": "300"}})
    assert (result.exit_code, says in result.output) == (2, True), (words, result.output)
    assert not {{"torch", "transformers"}} & sys.modules.keys(), words
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two runs, the older finished, the newer stopped at step 12."""
    monkeypatch.chdir(tmp_path)
    one, two = (fake_run(tmp_path / "runs" / name, "chat")[0] for name in ("one", "two"))
    one.append(Event("end", 120, 0.0, {"report": {}}))
    two.append(Event("stopped", 12, 0.0, {"message": "stopped"}))
    for created, run in enumerate((one, two)):
        run.write_json("run.json", run.read_json("run.json") | {"created": 1000.0 + created})
    return tmp_path / "runs"


def test_what_is_cheap_to_check_is_refused_before_torch_is_imported(root: Path) -> None:
    (root.parent / "model").mkdir()
    (root.parent / "model" / "config.json").write_text("{}")
    for name in ("exp 1", "_ä"):
        shutil.copytree(root / "one", root / name)
    (root.parent / "grader.py").write_text("import torch\n")
    (root.parent / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (root.parent / "wrong.jsonl").write_text('{"foo": 1}\n{"foo": 2}\n')
    code = CODE.format(cases=CASES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_last_is_named_with_its_state_and_the_last_finished_run(root: Path) -> None:
    def said() -> str:
        return CliRunner().invoke(app, ["runs", "rm", "last"]).stderr

    assert "last: runs/two, stopped at step 12; the last finished run is runs/one\n" in said()
    Run(root / "two").append(Event("end", 120, 0.0, {"report": {}}))
    assert "last: runs/two, done\n" in said()
