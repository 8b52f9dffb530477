"""Exports that a recipe asks for: a word that means none is refused before the run, the others are there after it."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from export.exports import quick
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import chats, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import InputError, RecipeError
from tunesmith.export import llama_cpp
from tunesmith.export.export_run import TARGETS, parse_export
from tunesmith.export.target import ExportOptions
from tunesmith.recipe.load import validate
from tunesmith.runs.folder import Run
from tunesmith.types import EXPORT_NAMES


def test_a_word_is_a_target_and_how_it_is_stored() -> None:
    assert parse_export("merged:float16")[1].dtype == "float16"
    assert (parse_export("gguf")[1].quant, parse_export("ollama:q4_0")[1].quant) == ("f16", "q4_0")
    for word, says in (("coreml", "there is no such target"), ("gguf:q3", "--quant: q3"), ("adapter:f16x", "--quant")):
        with pytest.raises(RecipeError, match=rf"export\.to: {word}: .*{says}"):
            parse_export(word)


def test_a_folder_is_named_by_target_and_quantisation() -> None:
    """`Run.export_path` is read without torch, so it knows by itself which targets have quantisations."""
    run = Run(Path("run"))
    assert tuple(TARGETS) == EXPORT_NAMES
    for name, target in TARGETS.items():
        assert run.export_path(name).name == (f"{name}-{ExportOptions().quant}" if target.quants else name)
        assert run.export_path(f"{name}:x").name == (f"{name}-x" if target.quants else name)


@pytest.mark.parametrize(
    ("arch", "export", "method", "says"),
    [
        ("llama", "tflite", "lora", r"export\.to: tflite"),
        ("opt", "gguf", "lora", "a opt cannot be written"),
        ("mistral", "ollama:q8_0", "lora", "attends to the last 8 tokens only"),
        ("llama", "gguf:q4_k_m", "lora", "llama-cpp-python is not installed"),
        ("qwen3_moe", "onnx", "lora", "a qwen3_moe has not been shown"),
        ("llama", "adapter", "full", "every weight is tuned, so there is no adapter"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_the_run(
    arch: str, export: str, method: str, says: str, tmp_path: Path
) -> None:
    recipe = tiny_recipe(tmp_path, arch=arch).model_dump() | {"export": {"to": ["merged", export]}}
    recipe["method"] = "full" if method == "full" else {"name": "lora", "rank": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp, "is_installed", lambda: False)
        with pytest.raises(InputError, match=says):
            tunesmith.train(recipe=validate(recipe), root=tmp_path / "runs", offline=True)
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_has_its_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    tokenizer = tiny_tokenizer()
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = chats(tmp_path / "rows.jsonl", 12)
    words = ["train", str(tmp_path / "model"), str(rows), "--method", "lora", "--out", str(tmp_path / "run")]
    fast = ["train.max_steps=2", "evaluation.samples=0", "evaluation.general=false", "evaluation.surprising=0",
            "precision=float32", "device=cpu", "threads=1"]  # fmt: skip
    options = [word for option in fast for word in ("--set", option)]
    exports = ["--export", "merged", "--export", "gguf:q8_0"]
    result = CliRunner().invoke(app, [*words, *options, *exports, "--offline", "--json"])
    assert result.exit_code == 0, result.output
    told = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"kind":"export"')]
    assert [(one["target"], one["verified"]) for one in told] == [("merged", True), ("gguf", True)]
    assert (tmp_path / "run" / "exports" / "gguf-q8_0" / "run-q8_0.gguf").is_file()
    shutil.rmtree(tmp_path / "run" / "exports" / "merged")
    result = CliRunner().invoke(app, ["resume", str(tmp_path / "run"), "--track", "mlflow"])
    assert result.exit_code == 0, result.output
    words = "it was done except for 1 export, made now. --track (see `tunesmith track`) had no effect"
    assert f"{tmp_path / 'run'}: {words}\n" in result.stderr
    assert (tmp_path / "run" / "exports" / "merged" / "verify.json").is_file()
    result = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
    assert "this run is done" in result.stderr
    shutil.rmtree(tmp_path / "run" / "exports" / "merged")
    with pytest.warns(tunesmith.TunesmithWarning, match="it was done except for 1 export, made now"):
        tunesmith.resume(tmp_path / "run")
    assert (tmp_path / "run" / "exports" / "merged" / "verify.json").is_file()
    shutil.rmtree(tmp_path / "run" / "exports" / "merged")
    reached = list[str]()
    monkeypatch.setattr("tunesmith.training.trainer.resume", lambda run, **_: reached.append(run.path.name) or run)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["resume", str(tmp_path / "run")])
    assert (result.exit_code, reached) == (0, ["run"]), result.output
    tunesmith.resume(tmp_path / "run")
    assert reached == ["run", "run"]
    assert not (tmp_path / "run" / "exports" / "merged").exists()  # one of several ranks makes none
