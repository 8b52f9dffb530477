from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.cli.options import data_file, given
from tunesmith.recipe import read
from tunesmith.run import is_run


@pytest.mark.parametrize(
    ("text", "file"),
    [
        ("rows.jsonl", {"path": "rows.jsonl"}),
        ("rows.jsonl:2", {"path": "rows.jsonl", "weight": 2.0}),
        ("rows.jsonl:0.5", {"path": "rows.jsonl", "weight": 0.5}),
        ("rows.jsonl:.5", {"path": "rows.jsonl", "weight": 0.5}),
        ("C:rows.jsonl", {"path": "C:rows.jsonl"}),
        ("a:b.jsonl", {"path": "a:b.jsonl"}),
        (":2", {"path": ":2"}),
    ],
)
def test_data_with_a_weight(text: str, file: dict[str, object]) -> None:
    assert data_file(text) == file


def test_a_file_whose_whole_name_exists_wins(tmp_path: Path) -> None:
    path = tmp_path / "rows:2"
    path.write_text("{}")
    assert data_file(str(path)) == {"path": str(path)}


def test_words_of_the_command_line_become_recipe_keys() -> None:
    words = given(
        {
            "model": 'quo"te: [#👍]',
            "data.train": [{"path": "a b.jsonl", "weight": 2.0}],
            "data.eval": [],
            "task": None,
            "method.name": "lora",
        }
    )
    recipe = read.load(None, [*words, "method.rank=8", "optim.lr=1e-4"])
    assert recipe.model == 'quo"te: [#👍]'
    assert [(file.path, file.weight) for file in recipe.data.train] == [("a b.jsonl", 2.0)]
    assert recipe.data.eval == ()
    assert recipe.method.model_dump()["rank"] == 8
    assert recipe.optim.lr == 1e-4


def test_a_run_and_a_model_are_told_apart(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "support-3f2a"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    model = tmp_path / "support"
    model.mkdir()
    root = tmp_path / "runs"
    assert is_run("support-3f2a", root)
    assert is_run("supp", root)
    assert is_run("last", root)
    assert is_run(str(run), root)
    assert not is_run(str(model), root)
    assert not is_run("HuggingFaceTB/SmolLM2-135M-Instruct", root)
    assert not is_run("gpt2", root)


VERBS = (
    "check",
    "train",
    "resume",
    "runs",
    "show",
    "chat",
    "serve",
    "predict",
    "eval",
    "compare",
    "selftest",
    "recipe",
    "doctor",
)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    assert f"tunesmith {verb}" in result.output.split("Usage:")[1].split("\n", 2)[2]


def test_help_names_every_verb_and_the_exit_codes() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"})
    assert all(verb in result.output for verb in VERBS)
    assert "0 done, 1 failed, 2 bad input, 3 stopped and resumable" in result.output


def test_version() -> None:
    from tunesmith import __version__

    assert CliRunner().invoke(app, ["--version"]).output == f"tunesmith {__version__}\n"


def test_recipe_is_printed_ready_to_edit(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["recipe", "--set", "method.rank=8"]).output
    (tmp_path / "recipe.yaml").write_text(printed)
    assert read.load(str(tmp_path / "recipe.yaml")) == read.load(None, ["method.rank=8"])
    assert "# " in printed


def test_schema_is_json() -> None:
    import json

    schema = json.loads(CliRunner().invoke(app, ["recipe", "--schema"]).output)
    assert "optim" in schema["properties"]


@pytest.mark.parametrize("words", [[], ["some/model"]])
def test_nothing_to_train_on_is_bad_input(words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *words, "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 2
    assert "nothing was given" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_all_wrong_settings_at_once(tmp_path: Path) -> None:
    words = ["train", "m", "d.jsonl", "--task", "talk", "--set", "method.rnk=8", "--set", "optim.lr=-1"]
    result = CliRunner().invoke(app, [*words, "--runs", str(tmp_path)])
    assert result.exit_code == 2
    for key in ("task", "method.rnk", "optim.lr"):
        assert key in result.stderr
    assert "method.rank" in result.stderr
