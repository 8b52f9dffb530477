"""Exports that a recipe asks for: a word that means none is refused before the run, the others are there after it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from export.exports import quick
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import chats, tiny_recipe
from tunesmith.cli.app import app
from tunesmith.errors import RecipeError
from tunesmith.export.export_run import parse_export


def test_a_word_is_a_target_and_how_it_is_stored() -> None:
    assert parse_export("merged:float16")[1].dtype == "float16"
    assert (parse_export("gguf")[1].quant, parse_export("ollama:q4_0")[1].quant) == ("f16", "q4_0")
    for word, says in (("coreml", "there is no such target"), ("gguf:q3", "--quant: q3"), ("adapter:f16x", "--quant")):
        with pytest.raises(RecipeError, match=rf"export\.to: {word}: .*{says}"):
            parse_export(word)


def test_a_word_that_means_no_export_is_refused_before_the_run(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"to": ("merged", "tflite")})})
    with pytest.raises(RecipeError, match=r"export\.to: tflite"):
        tunesmith.train(recipe=recipe, root=tmp_path / "runs", offline=True)
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
