"""Files with weights on the command line."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith.cli.app import app
from tunesmith.cli.options import data_file, mix_of, refuse_unreadable
from tunesmith.errors import InputError
from tunesmith.recipe.schema import AS_IT_IS


@pytest.mark.parametrize(
    ("typed", "path", "weight"),
    [
        ("a.jsonl", "a.jsonl", None),
        ("a.jsonl:0.7", "a.jsonl", 0.7),
        ("a.jsonl:2", "a.jsonl", 2),
        ("a.jsonl:1e-1", "a.jsonl", 0.1),
        ("a.jsonl:.5", "a.jsonl", 0.5),
        (":2", ":2", None),
        (r"C:\data\a.jsonl", r"C:\data\a.jsonl", None),
        (r"C:\data\a.jsonl:0.5", r"C:\data\a.jsonl", 0.5),
        ("D:2", "D:2", None),
        ("odd:name.jsonl", "odd:name.jsonl", None),
        ("odd:name.jsonl:0.5", "odd:name.jsonl", 0.5),
        ("hf://datasets/owner/name:3", "hf://datasets/owner/name", 3),
    ],
)
def test_a_weight_follows_the_last_colon(typed: str, path: str, weight: float | None) -> None:
    found = data_file(typed)
    assert found == ({"path": path} if weight is None else {"path": path, "weight": weight})


def test_a_file_whose_whole_name_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("part:2").write_text("", "utf-8")
    assert data_file("part:2") == {"path": "part:2"}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["a.jsonl:1e3"], "a.jsonl:1e3: its weight is 1e3: 100 is the most"),
        (["a.jsonl:x"], "a.jsonl:x: 'x' is not a weight for a.jsonl. Write a number above 0: a.jsonl:0.5"),
        (["a.jsonl:0.7", "a.jsonl:0.3"], "a.jsonl: is there twice: give it once, with a weight (a.jsonl:2)."),
        ([""], "DATA is empty. Give the name of a file, a folder or an address."),
    ],
)
def test_what_was_typed_as_data_is_refused_by_its_own_name(
    typed: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"text": "a"}\n', "utf-8")
    result = CliRunner().invoke(app, ["check", *typed])
    assert f"error: {message}" in result.stderr
    with pytest.raises(InputError, match="DATA is empty"):
        refuse_unreadable([""], AS_IT_IS)


@pytest.mark.parametrize("typed", ["a.jsonl:0", "a.jsonl:-0.3", "a.jsonl:0.0"])
def test_a_weight_that_is_not_above_0_is_refused(typed: str) -> None:
    with pytest.raises(InputError, match=r"its weight is .*: it must be above 0"):
        data_file(typed)


@pytest.mark.parametrize(
    ("typed", "mix"),
    [
        (["a:0.7", "b:0.3"], None),  # drives of Windows
        (["aa:0.7", "bb:0.3"], "shares"),
        (["aa:0.1", "bb:0.2", "cc:0.7"], "shares"),
        (["aa:0.5", "bb:0.4"], None),
        (["aa:1"], None),
        (["aa:0.5", "bb"], None),
        (["aa", "bb"], None),
    ],
)
def test_weights_of_several_files_that_add_up_to_1_are_shares(typed: list[str], mix: str | None) -> None:
    assert mix_of([data_file(one) for one in typed]) == mix
