"""The commands: refusals come before anything is loaded, and the key `track` is not part of what a run is."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from trackers.logs import new_run
from tunesmith.cli.app import app
from tunesmith.errors import InputError
from tunesmith.recipe.docs import as_yaml, changed
from tunesmith.recipe.load import load, validate
from tunesmith.trackers.libraries import check_names, problem_of


def test_a_run_is_not_sent_to_none() -> None:
    found = CliRunner().invoke(app, ["track", "RUN", "--to", "none"])
    assert found.exit_code == 2
    assert "--to: none: names no tracker" in " ".join(found.output.split())


@pytest.mark.parametrize("words", [["train", "./model", "rows.jsonl", "--track"], ["track", "RUN", "--to"]])
@pytest.mark.parametrize(("name", "message"), [("wandbb", "there is no such tracker"), ("wandb", "is missing")])
def test_an_unknown_or_missing_tracker_ends_with_exit_code_2(
    words: list[str], name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.trackers.libraries.importlib.util.find_spec", lambda name: None)
    places = {"RUN": str(new_run(tmp_path).path), "rows.jsonl": str(tmp_path / "rows.jsonl")}
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', "utf-8")
    found = CliRunner().invoke(app, [places.get(word, word) for word in words] + [name])
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_all_missing_packages_are_named_with_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.trackers.libraries.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"wandb, mlflow: the packages are missing.*pip install .*(mlflow|tracking)"):
        check_names(["wandb", "mlflow"])


def test_a_missing_driver_of_a_database_comes_with_its_command() -> None:
    line = problem_of("mlflow", ModuleNotFoundError("No module named 'psycopg'"))
    assert "'psycopg'. Install it: " in line
    assert line.endswith("-m pip install 'psycopg[binary]'")


def test_the_trackers_of_a_recipe_are_kept_and_are_no_part_of_its_meaning(tmp_path: Path) -> None:
    recipe = validate({"model": "m", "track": ["wandb", "mlflow"]})
    (tmp_path / "recipe.yaml").write_text(as_yaml(recipe, comments=False), "utf-8")
    assert load(str(tmp_path / "recipe.yaml")).track == ("wandb", "mlflow")
    assert changed(recipe) == changed(validate({"model": "m"}))
    assert validate({"track": "wandb"}).track == ("wandb",)


@pytest.mark.parametrize(
    "header", ["Basic YXBpOjAxMjM0NTY3ODk=", "Bearer 0123456789abcdef", "authorization: basic YXBpOjAx"]
)
def test_credentials_that_a_server_sends_back_are_not_printed(header: str) -> None:
    line = problem_of("wandb", RuntimeError(f"400: bad header {header} in https://me:secret@host/x?key=1"))
    assert header.rsplit(maxsplit=1)[-1] not in line
    assert "secret" not in line
