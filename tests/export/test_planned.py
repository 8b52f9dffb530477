"""Exports that a recipe asks for: what cannot be is said before the first step, what can be is there after the last."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tunesmith
from export.exports import SHORT, quick
from tiny import tiny_tokenizer
from tiny_model import tiny_model
from tiny_run import chats, tiny_recipe
from tiny_tasks import task_recipe
from tunesmith.cli.app import app
from tunesmith.errors import InputError, ModelError, RecipeError, RunError
from tunesmith.export import llama_cpp
from tunesmith.export.export_run import check_planned
from tunesmith.export.targets import parse_export
from tunesmith.recipe.schema import Recipe


def asking(folder: Path, *exports: str, arch: str = "llama", **sections: Any) -> Recipe:
    recipe = tiny_recipe(folder, arch=arch, **{**SHORT, **sections})
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"to": exports})})


def notes(recipe: Recipe, tmp_path: Path) -> list[str]:
    return check_planned(recipe, root=tmp_path, offline=True)


def test_a_word_is_a_target_and_how_it_is_stored() -> None:
    assert parse_export("merged:float16")[1].dtype == "float16"
    assert (parse_export("gguf")[1].quant, parse_export("ollama:q4_0")[1].quant) == ("f16", "q4_0")
    for word, says in (("coreml", "there is no such target"), ("gguf:q3", "--quant: q3"), ("adapter:f16x", "--quant")):
        with pytest.raises(RecipeError, match=rf"export\.to: {word}: .*{says}"):
            parse_export(word)


@pytest.mark.parametrize(
    ("arch", "export", "method", "says"),
    [
        ("opt", "gguf", {}, "a opt cannot be written"),
        ("mistral", "ollama:q8_0", {}, r"attends to the last 8 tokens only"),
        ("llama", "adapter", {"name": "full"}, "every weight was tuned, so there is no adapter"),
    ],
)
def test_what_cannot_be_exported_is_said_before_training(
    arch: str, export: str, method: dict[str, Any], says: str, tmp_path: Path
) -> None:
    recipe = asking(tmp_path, "merged", export, arch=arch)
    plain = recipe.model_dump()
    plain["method"] = {"name": "lora", "rank": 4, **method} if method.get("name") != "full" else "full"
    with pytest.raises((ModelError, RunError), match=says):
        tunesmith.train(recipe=tunesmith.Recipe.model_validate(plain), root=tmp_path / "runs", offline=True)
    assert not (tmp_path / "runs").exists()


def test_a_missing_quantiser_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with pytest.raises(ModelError, match="llama-cpp-python is not installed"):
        notes(asking(tmp_path, "gguf:q4_k_m"), tmp_path)


def test_what_a_head_cannot_go_to_is_known_before_training_too(tmp_path: Path) -> None:
    recipe = task_recipe(tmp_path, "classify", "encoder", rows=8)
    recipe = recipe.model_copy(update={"export": recipe.export.model_copy(update={"to": ("gguf",)})})
    with pytest.raises(ModelError, match=r"\(encoder\) is tuned for classify"):
        notes(recipe, tmp_path)


def test_what_will_be_said_is_said_before(tmp_path: Path) -> None:
    assert notes(asking(tmp_path), tmp_path) == []
    said = notes(asking(tmp_path, "gguf", "merged:bfloat16"), tmp_path)
    assert any(note.startswith("gguf: llama.cpp's pre-tokenizer is gpt-2") for note in said)
    assert any(note.startswith("merged: weights are rounded from float32 to bfloat16") for note in said)


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


def test_a_wrong_word_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"export\.to: tflite"):
        notes(asking(tmp_path, "tflite"), tmp_path)
